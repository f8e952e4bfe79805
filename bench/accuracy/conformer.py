"""A grown Conformer beside the same without its new branches: WER.

    saml grow-conformer --data voices.jsonl --out grown
    saml grow-conformer --data voices.jsonl --out control --control
    python -m bench conformer --grown grown --control control --data LibriSpeech/test-other

Full precision, greedy decoding, clips of up to 30 s. The ratio is of the grown model's errors to a
system's, with a 95 % interval over speakers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.models.clips import at_once, spread
from saml_kernels.errors import SAMLError
from saml_kernels.files import check_output, is_json, write_json
from saml_models.cli.output import progress
from saml_models.compress.loading import load_model
from saml_models.data.corpora import load_corpus
from saml_models.models.registry import bind
from saml_models.models.whisper.conformer import ConformerWhisper, without_branches
from saml_models.runtime.quiet import quiet_libraries
from saml_models.text.wer import WordErrors, bootstrap_speakers, pooled, word_errors
from saml_models.transcription.clips import decode_clips


def main(
    grown: Annotated[str, typer.Option(help="A Conformer: folder, file or name.")],
    data: Annotated[list[Path], typer.Option(help="A corpus of English; may be repeated.")],
    whisper: Annotated[str, typer.Option(help="That it grew from.")] = "tiny.en",
    control: Annotated[str | None, typer.Option(help="From grow-conformer --control.")] = None,
    clips: Annotated[int | None, typer.Option(help="Of each corpus at most; default all.")] = None,
    json: Annotated[Path | None, typer.Option(help="Where results go, too.")] = None,
) -> None:
    quiet_libraries()
    if json is not None:
        check_output(json, is_json("conformer"), True)
    corpora = {path.stem: at_once(load_corpus(path)) for path in data}
    if clips is not None:
        corpora = {name: spread(found, clips) for name, found in corpora.items()}
    errors: dict[str, dict[str, list[WordErrors]]] = {}
    total = (3 + (control is not None)) * sum(map(len, corpora.values()))
    with progress("decoding") as show:
        done = 0
        for system, pair in _systems(grown, whisper, control):
            for name, found in corpora.items():

                def count(more: int, system: str = system) -> None:
                    nonlocal done
                    done += more
                    show(done, total, system)

                audio = [utterance.load() for utterance in found]
                heard = decode_clips(bind(*pair), audio, on_done=count)
                said = [utterance.text for utterance in found]
                errors.setdefault(name, {})[system] = word_errors(said, heard)
    rows = []
    for name, by_system in errors.items():
        speakers = [utterance.speaker for utterance in corpora[name]]
        ours = [e.errors for e in by_system["grown"]]
        for system, own in by_system.items():
            ratio = bootstrap_speakers(speakers, ours, [e.errors for e in own])
            wer = float(pooled(own).wer)
            rows.append({"data": name, "system": system, "wer": wer, "grown_to_it": ratio})
    if json is not None:
        write_json(json, {"conformer": rows, "grown": grown, "control": control})
    _print(rows)


def _systems(
    grown: str, whisper: str, control: str | None
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """By name, one in memory at a time but for the grown one."""
    network, processor = load_model(grown)
    if not isinstance(network, ConformerWhisper):
        raise SAMLError(f"{grown}: expected a Conformer that grew from a Whisper")
    yield "grown", (network, processor)
    yield "grown, new branches zero", (without_branches(network), processor)
    yield "Whisper", load_model(whisper)
    if control is not None:
        yield "Whisper, encoder trained as long", load_model(control)


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="word error rate")
    for name in ("data", "system", "WER %", "grown / it (95 %)"):
        table.add_column(name)
    for row in rows:
        ratio, low, high = row["grown_to_it"]
        said = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
        table.add_row(row["data"], row["system"], f"{row['wer']:.2f}", said)
    Console().print(table)
