"""Kinds of profiles, and many speakers in one batch.

    python -m bench profiles --data DATA --json bench/results/voices-tiny.en.json

On the development readers (train-clean-5, 20 utterances to adapt, the rest to test): the pretrained
experts, gates alone, a speaker's own experts, the same without transcripts, and pruned: WER and
bytes. Then sixteen clips of sixteen speakers in one batch beside the same clips of one speaker,
interleaved. Results are kept speaker by speaker: a run that was stopped goes on at the next one.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.accuracy.speech import READERS
from bench.report.environment import device_name
from saml_kernels.files import write_json
from saml_models.data.corpora import by_speaker, load_corpus
from saml_models.evaluation.protocol import Fold, make_folds
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.wer import WordErrors, pooled, word_errors
from saml_models.training.adapt import adapt
from saml_models.training.pruning import measure_usage, prune
from saml_models.training.pseudo_labels import adapt_unsupervised
from saml_models.transcription.clips import decode_clips

KINDS = {
    "experts": "pretrained experts",
    "gates": "gates alone",
    "adapted": "own experts",
    "unsupervised": "own experts, without transcripts (one round)",
    "pruned": "own experts, half of them",
}
ROWS, REPEATS = 16, 5


def one_speaker(model: Any, processor: Any, fold: Fold) -> dict[str, Any]:
    """Counts of word errors, bytes of the file, and seconds of adapting, by kind."""
    clips, said = [u.load() for u in fold.test], [u.text for u in fold.test]
    found: dict[str, Any] = {}

    def add(kind: str, profile: SpeakerProfile | None, seconds: float) -> None:
        heard = decode_clips(bind(model, processor), clips, speakers=[profile] * len(clips))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "p.safetensors"
            (profile or SpeakerProfile.of(model)).save(path)
            size = path.stat().st_size
        counts = pooled(word_errors(said, heard))
        found[kind] = {"errors": asdict(counts), "bytes": size, "seconds": round(seconds, 1)}
        if profile is not None and "guard" in profile.about:
            found[kind] |= {k: profile.about[k] for k in ("guard", "adapted", "clips_believed")}

    add("experts", None, 0.0)
    profiles = {}
    for kind, learn in {
        "gates": lambda: adapt(model, processor, fold.train, kind="gates", guard=False),
        "adapted": lambda: adapt(model, processor, fold.train, guard=False),
        "unsupervised": lambda: adapt_unsupervised(model, processor, fold.train, rounds=1),
    }.items():
        started = time.monotonic()
        profiles[kind] = learn()
        add(kind, profiles[kind], time.monotonic() - started)
    started = time.monotonic()
    own = [u.load() for u in fold.train]
    usage = measure_usage(bind(model, processor), own, profiles["adapted"])
    half = prune(profiles["adapted"], model, usage, usage.shares.numel() // 2)
    add("pruned", half, time.monotonic() - started)
    return found


@torch.no_grad()
def throughput(model: Any, processor: Any, folds: list[Fold]) -> dict[str, Any]:
    """Seconds for a batch of sixteen clips: of one speaker, and of sixteen."""
    clips = [u.load()[: 8 * 16000] for fold in folds for u in fold.test[:3]][:ROWS]
    speakers = []
    for seed in range(ROWS):
        torch.manual_seed(seed)
        with model.saml.snapshot():
            for parameter in model.saml.experts().values():
                parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
            speakers.append(SpeakerProfile.of(model, speaker=str(seed)))
    started = time.monotonic()
    for speaker in speakers:
        speaker.check(model)
        speaker.experts(model)
    loading = (time.monotonic() - started) / ROWS
    times: dict[str, list[float]] = {"one": [], "sixteen": []}
    for turn in range(REPEATS + 1):  # the first is for warming up
        for name, chosen in (("one", speakers[:1] * ROWS), ("sixteen", speakers)):
            started = time.monotonic()
            decode_clips(bind(model, processor), clips, speakers=chosen)
            if turn:
                times[name].append(time.monotonic() - started)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seconds": {name: [round(v, 3) for v in values] for name, values in times.items()},
        "throughput_of_sixteen_to_one": round(middle["one"] / middle["sixteen"], 3),
        "milliseconds_to_load_a_profile": round(1000 * loading, 1),
        "device": device_name(torch.device("cpu")),
    }


def table(speakers: dict[str, Any]) -> Table:
    """WER and bytes by kind of profile."""
    found = Table(title=f"{len(speakers)} speakers")
    for column in ("profile", "WER %", "bytes"):
        found.add_column(column, justify="left" if column == "profile" else "right")
    for kind, label in KINDS.items():
        rows = [row[kind] for row in speakers.values()]
        total = pooled([WordErrors(**row["errors"]) for row in rows])
        size = statistics.mean(row["bytes"] for row in rows)
        found.add_row(label, f"{total.wer:.2f}", f"{size:,.0f}")
    return found


def main(
    data: Annotated[Path, typer.Option(help="Holds LibriSpeech/train-clean-5.")],
    json_file: Annotated[Path, typer.Option("--json", help="Results, added to.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    readers: Annotated[str, typer.Option(help="By commas.")] = ",".join(READERS),
    test_utterances: Annotated[int, typer.Option(help="Of each, at most.")] = 14,
) -> None:
    quiet_libraries()
    console = Console()
    found = load_corpus(data / "LibriSpeech" / "train-clean-5", readers.split(","))
    folds = make_folds(by_speaker(found), 20, 2)
    folds = [replace(fold, test=fold.test[:test_utterances]) for fold in folds]
    network, processor = load_adaptable(model)
    results: dict[str, Any] = json.loads(json_file.read_text()) if json_file.exists() else {}
    speakers = results.setdefault("speakers", {})
    for fold in folds:
        if fold.speaker not in speakers:
            console.print(f"speaker {fold.speaker}")
            speakers[fold.speaker] = one_speaker(network, processor, fold)
            write_json(json_file, results)
    if "throughput" not in results:
        results["throughput"] = throughput(network, processor, folds)
    results["wer"] = {
        kind: round(pooled([WordErrors(**row[kind]["errors"]) for row in speakers.values()]).wer, 2)
        for kind in KINDS
    }
    write_json(json_file, results)
    console.print(table(speakers))
    console.print(results["throughput"])
