"""Routers, mixtures and recipes on the development speakers.

    python -m bench defaults --data DATA --json bench/results/defaults-tiny.en.json

`--only token,speaker` takes some of VARIANTS, `--variant 'hot:{"pretraining": {"learning_rate":
2e-3}}'` one of one's own.

Every variant is trained from nothing: stage 1 on the speakers that nobody is tested on, then stage
2 on each development speaker. Results are WER (%), greedy, of the experts alone and adapted, and
the bytes of the whole model on disk. They are written after each variant; one that is in the file
already is not run again. About a quarter of an hour each on two cores.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.accuracy.speech import READERS, development_speech
from bench.models.clips import at_once
from saml_kernels import SAMLConfig
from saml_kernels.files import write_json
from saml_models.compress.checkpoint import save_saml
from saml_models.compress.loading import load_model
from saml_models.compress.shipped_rounding import compress
from saml_models.data.corpora import Utterance, by_speaker, load_corpus
from saml_models.evaluation.protocol import Fold, make_folds
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.wer import pooled, word_errors
from saml_models.training.adapt import ADAPTATION
from saml_models.training.calibration import input_moments, start_experts, starts_from_error
from saml_models.training.loop import Sample, fit
from saml_models.training.options import TrainingOptions
from saml_models.training.pretrain import PRETRAINING
from saml_models.training.samples import training_samples
from saml_models.transcription.clips import decode_clips

# What differs from the defaults. Ranks are chosen so that the bytes come out alike.
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "token from LoRA's start": {"config": {"expert_init": "lora"}},
    "token from LoftQ's start": {"calibrated": False},
    "token top 2": {"config": {"top_k": 2}},
    "token 2 x rank 8": {"config": {"num_experts": 2, "rank": 8}},
    "token 8 x rank 2": {"config": {"num_experts": 8, "rank": 2}},
    "utterance": {"config": {"router": "utterance"}},
    "utterance merged": {"config": {"router": "utterance", "mix": "merged"}},
    "speaker": {"config": {"router": "speaker"}},
    "one LoRA of rank 17": {"config": {"num_experts": 1, "rank": 17, "router": "speaker"}},
    "the paper's": {"config": SAMLConfig.paper().to_dict()},
}


def development_sets(data: Path) -> dict[str, list[Fold]]:
    """The folds of the three sets of the README's table."""
    return {
        name: make_folds(by_speaker(found), 20 if name == "train-clean-5" else None, 2)
        for name, found in development_speech(data).items()
    }


def stage_one(data: Path) -> list[Utterance]:
    """Speech of the speakers that nobody is tested on, as in the README's `saml pretrain`."""
    found = load_corpus(data / "LibriSpeech" / "train-clean-5")
    found = [u for u in found if u.speaker not in READERS]
    for part in ("speechocean762", "librispeech-dev-clean-mp3"):
        found += load_corpus(data / part / "train.jsonl")
    return found


def _same(clip: np.ndarray) -> np.ndarray:
    return clip


class Bench:
    """Speech and its targets, found once; then one variant after the other."""

    def __init__(self, model: str, data: Path, console: Console, targets: Path) -> None:
        self.name, self.console = model, console
        self.sets = development_sets(data)
        heard, self.processor = load_model(model)
        base = {k: SAMLConfig().to_dict()[k] for k in ("format", "block_size", "double_quant")}
        self.report = compress(heard, SAMLConfig(num_experts=0, **base))
        # Targets are in the style that the bare quantised model writes, for every variant alike.
        known: dict[str, str] = json.loads(targets.read_text()) if targets.exists() else {}
        heard.saml.short_windows = True

        def samples(utterances: list[Utterance], keep: bool) -> list[Sample]:
            if not all(u.id in known for u in utterances):
                made = training_samples(bind(heard, self.processor), utterances, keep_audio=keep)
                known.update({u.id: s.text for u, s in zip(utterances, made, strict=True)})
                write_json(targets, known)
            return [
                Sample(partial(_same, clip) if keep else u.load, len(clip) / 16000, known[u.id])
                for u in utterances
                for clip in [u.load()]
            ]

        console.print("hearing stage 1")
        pretraining = at_once(stage_one(data))
        self.stage_one = samples(pretraining, keep=False)
        console.print("hearing the development speakers")
        self.stage_two = {
            name: [samples(f.train, keep=True) for f in folds] for name, folds in self.sets.items()
        }
        self.clips = {
            name: [[u.load() for u in f.test] for f in folds] for name, folds in self.sets.items()
        }

    def run(self, variant: dict[str, Any], chosen: list[str], profile: Path) -> dict[str, Any]:
        """Both stages of one variant; `profile` keeps the experts of stage 1."""
        config = replace(SAMLConfig(), **variant.get("config", {}))
        first = _options(PRETRAINING, variant.get("pretraining", {}))
        second = _options(ADAPTATION, variant.get("adaptation", {}))
        model, _ = load_model(self.name)
        report = compress(model, config)
        with tempfile.TemporaryDirectory() as folder:
            size = save_saml(model, self.processor, folder)
        model.saml.short_windows = True
        started = time.monotonic()
        start = variant.get("experts")
        if start:
            SpeakerProfile.load(start).apply(model)
        else:
            if starts_from_error(model) and variant.get("calibrated", True):
                original, _ = load_model(self.name)
                moments = input_moments(bind(original, self.processor), self.stage_one, first)
                start_experts(model, original, moments)
            fit(bind(model, self.processor), self.stage_one, first)
            SpeakerProfile.of(model, speaker="pretrained").save(profile)
        seconds = {"stage 1": time.monotonic() - started}
        wer: dict[str, dict[str, float]] = {"experts": {}, "adapted": {}}
        for name in chosen:
            folds, clips = self.sets[name], self.clips[name]
            said = [u.text for f in folds for u in f.test]
            flat = [c for part in clips for c in part]
            wer["experts"][name] = _wer(said, decode_clips(bind(model, self.processor), flat))
            started = time.monotonic()
            heard: list[str] = []
            for samples, part in zip(self.stage_two[name], clips, strict=True):
                with model.saml.snapshot():
                    fit(bind(model, self.processor), samples, second)
                    heard += decode_clips(bind(model, self.processor), part)
            wer["adapted"][name] = _wer(said, heard)
            seconds[name] = time.monotonic() - started
            self.console.print(f"  {name}: {wer['experts'][name]} -> {wer['adapted'][name]}")
        return {
            "wer": wer,
            "bytes": size,
            "ratio": round(self.report.full_bytes / size, 3),
            "trainable": report.trainable,
            "seconds": {k: round(v, 1) for k, v in seconds.items()},
            "variant": variant,
        }


def _options(base: TrainingOptions, changes: dict[str, Any]) -> TrainingOptions:
    tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return replace(base, **tuples)


def _wer(said: list[str], heard: list[str]) -> float:
    return round(float(pooled(word_errors(said, heard)).wer), 2)


def table(results: dict[str, Any]) -> Table:
    """A row for each variant: bytes, then WER of the experts alone and adapted, by set."""
    found = Table(title="WER %, experts alone -> adapted")
    found.add_column("variant")
    found.add_column("smaller", justify="right")
    sets = list(next(iter(results.values()))["wer"]["adapted"])
    for name in (*sets, "mean"):
        found.add_column(name, justify="right")
    for name, result in results.items():
        wer = result["wer"]
        cells = [f"{wer['experts'][s]:.2f} -> {wer['adapted'][s]:.2f}" for s in wer["adapted"]]
        mean = f"{np.mean(list(wer['adapted'].values())):.2f}"
        found.add_row(name, f"{result['ratio']:.2f}x", *cells, mean)
    return found


def main(
    data: Annotated[Path, typer.Option(help="Holds LibriSpeech/ and speechocean762/.")],
    json_file: Annotated[Path, typer.Option("--json", help="Results, added to.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    only: Annotated[str | None, typer.Option(help="Names in VARIANTS, by commas.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="NAME:{JSON} of one's own.")] = None,
    sets: Annotated[str, typer.Option()] = "train-clean-5,test-other,speechocean762",
) -> None:
    quiet_libraries()
    console = Console()
    own = dict(v.split(":", 1) for v in variant or [])
    plan = {name: json.loads(text) for name, text in own.items()}
    if not own or only:
        names = only.split(",") if only else list(VARIANTS)
        plan |= {name.strip(): VARIANTS[name.strip()] for name in names}
    results: dict[str, Any] = json.loads(json_file.read_text()) if json_file.exists() else {}
    bench = Bench(model, data, console, json_file.with_suffix(".targets.json"))
    for name, changes in plan.items():
        if name in results:
            continue
        console.print(name)
        profile = json_file.with_suffix(f".{name.replace(' ', '-')}.safetensors")
        results[name] = bench.run(changes, sets.split(","), profile)
        write_json(json_file, results)
    console.print(table(results))
