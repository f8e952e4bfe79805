"""Experts alone on all sets of voices, beside the models without them.

    python -m bench experts --data DATA --json bench/results/experts-tiny.en.json
    python -m bench experts ... --experts mine=experts.safetensors --sets readers,noisy

Systems: the model at full precision, quantised, with the experts that ship, and with those of each
`--experts NAME=FILE`. Nobody is adapted to: every utterance of the sets (`VOICES`) is heard,
greedily. What was heard is written after each set, and what is in the file is not done again. The
table gives pooled word error rates, ratios to full precision and to the quantised model with 95 %
intervals over speakers (of one speaker there is none), and for how many speakers there are more
errors than with the quantised model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.accuracy.over_speakers import made_worse, ratio
from bench.accuracy.speech import VOICES
from bench.report.environment import about
from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.files import write_json
from saml_models.cli.output import progress
from saml_models.compress.loading import load_model
from saml_models.compress.shipped_rounding import compress
from saml_models.data.corpora import Utterance, load_corpus
from saml_models.models.interface import QUANTISED_MARGIN, SpeechModel
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries
from saml_models.speakers.pretrained import load_adaptable
from saml_models.text.wer import pooled, word_errors
from saml_models.transcription.clips import decode_clips

FULL, QUANTISED, SHIPPED = "full precision", "quantised", "shipped experts"
HEADS = ("voices", "system", "WER %", "to full precision", "to quantised", "made worse")


class Bench:
    """The systems, and what of them is in the results."""

    def __init__(self, model: str, data: Path, files: dict[str, Path], save: Any) -> None:
        self.model, self.data, self.files, self.save = model, data, files, save

    def made(self, system: str) -> SpeechModel:
        """The model of a system."""
        if system == FULL:
            return bind(*load_model(self.model))
        if system == QUANTISED:
            network, processor = load_model(self.model)
            compress(network, SAMLConfig(num_experts=0))
            network.saml.margin = QUANTISED_MARGIN
            return bind(network, processor)
        return bind(*load_adaptable(self.model, experts=self.files.get(system)))

    def hear(self, sets: list[str], results: dict[str, Any]) -> None:
        """Whatever of these sets and systems is not in the results yet."""
        for system in (FULL, QUANTISED, SHIPPED, *self.files):
            heard = results["systems"].setdefault(system, {})
            missing = [key for key in sets if key not in heard]
            speech = self.made(system) if missing else None
            for key in missing:
                assert speech is not None
                said = load_corpus(self.data / VOICES[key].path, VOICES[key].speakers)
                heard[key] = _heard(speech, said, f"{system}: {key}")
                own = {"speakers": [u.speaker for u in said], "said": [u.text for u in said]}
                results["speech"].setdefault(key, own)
                self.save()


def _heard(speech: SpeechModel, said: list[Utterance], title: str) -> list[str]:
    done = 0
    with progress("decoding") as show:

        def count(more: int) -> None:
            nonlocal done
            done += more
            show(done, len(said), title)

        clips = [u.load() for u in said]
        return decode_clips(speech, clips, language="en", on_done=count)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """A row for each set and system."""
    found = []
    for key, speech in results["speech"].items():
        counted = {
            system: word_errors(speech["said"], heard[key])
            for system, heard in results["systems"].items()
            if key in heard
        }
        errors = {system: [e.errors for e in own] for system, own in counted.items()}
        for system, own in errors.items():
            row = [key, system, f"{pooled(counted[system]).wer:.2f}"]
            full = errors.get(FULL) if system != FULL else None
            quantised = errors.get(QUANTISED) if system not in (FULL, QUANTISED) else None
            row.append(ratio(speech["speakers"], own, full) if full else "")
            row.append(ratio(speech["speakers"], own, quantised) if quantised else "")
            row.append(made_worse(speech["speakers"], own, quantised) if quantised else "")
            found.append(row)
    return found


def main(
    data: Annotated[Path, typer.Option(help="Holds LibriSpeech/, speechocean762/ and so on.")],
    json_file: Annotated[Path, typer.Option("--json", help="Results, added to.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    experts: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE from `saml pretrain`; may be repeated.")
    ] = None,
    sets: Annotated[str, typer.Option(help="Of VOICES, by commas.")] = ",".join(VOICES),
) -> None:
    quiet_libraries()
    chosen = [key.strip() for key in sets.split(",")]
    if unknown := [key for key in chosen if key not in VOICES]:
        raise SAMLError(f"--sets {unknown[0]}: expected some of {', '.join(VOICES)}")
    files = {}
    for one in experts or []:
        name, _, file = one.partition("=")
        if not Path(file).is_file():
            raise SAMLError(f"--experts {one}: expected NAME=FILE, the file from `saml pretrain`")
        files[name] = Path(file)
    results: dict[str, Any] = {"speech": {}, "systems": {}}
    if json_file.exists():
        results = json.loads(json_file.read_text())
    results["about"] = about(torch.device("cpu")) | {"model": model}
    bench = Bench(model, data, files, lambda: write_json(json_file, results))
    bench.hear(chosen, results)
    table = Table(title=f"{model}: ratios with 95 % intervals over speakers")
    for head in HEADS:
        table.add_column(head, justify="left" if head in HEADS[:2] else "right")
    for row in rows(results):
        table.add_row(*row)
    Console().print(table)
