"""What rounding costs, and what calibrated rounding gives back: WER and KL to full precision.

    python -m bench.accuracy.rounding --data ../shared/data --json rounding-tiny.en.json
    python -m bench.accuracy.rounding ... --only calibrated-0 --kl-only

Variants: full precision, today's rounding, and calibrated rounding with several draws of the
calibration clips. Clips come from the training sets alone. KL is the mean over text tokens of
KL(full precision || variant), the decoder given the reference in the model's own style; WER is
greedy. Results are written after each set of each variant, and what is in the file is not measured
again. On two cores a variant takes about ten minutes, one without WER three.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.report.environment import about
from saml_kernels import SAMLConfig
from saml_kernels.files import write_json
from saml_models.compress.apply import apply_saml
from saml_models.compress.calibrate import Recipe, calibrate
from saml_models.compress.calibration_speech import choose_utterances, prepare_clips
from saml_models.data.corpora import Utterance, load_corpus
from saml_models.models.registry import family_of
from saml_models.models.whisper.loading import load_whisper
from saml_models.models.whisper.windows import audio_window, clip_window, log_mel
from saml_models.runtime.quiet import quiet_libraries
from saml_models.text.style import in_model_style
from saml_models.text.wer import word_errors
from saml_models.transcription.clips import decode_clips

# Readers of train-clean-5 that adaptation is measured on: no calibration on them.
READERS = ("163", "332", "1867", "3526", "7859", "8629")
TRAINING = (
    "librispeech-first-utterances",
    "librispeech-dev-clean-mp3",
    "speechocean762",
    "speechocean762-more",
    "kathleen",
    "ljspeech",
)
FULL, PLAIN = "full precision", "as today"


@dataclass(frozen=True)
class Set:
    """What is measured: a manifest, how many of its clips, and the window they are heard in."""

    manifest: str
    clips: int
    margin: float | None  # seconds after a clip; None: 30 s


SETS = {
    "vctk": Set("vctk/dev.jsonl", 160, None),
    "voicebank-noisy": Set("voicebank-noisy/dev.jsonl", 160, None),
    "speechocean762": Set("speechocean762/test.jsonl", 140, 10.0),
    "librispeech-readers": Set("librispeech-readers/dev.jsonl", 120, None),
}


def training_speech(data: Path) -> list[Utterance]:
    """Of speakers that nothing is reported on."""
    found = load_corpus(data / "LibriSpeech" / "train-clean-5")
    found = [u for u in found if u.speaker not in READERS]
    for part in TRAINING:
        found += load_corpus(data / part / "train.jsonl")
    return found


def measured_speech(data: Path, one: Set, most: int) -> list[Utterance]:
    """Evenly spread over the manifest, so that every speaker is heard."""
    found = load_corpus(data / one.manifest)
    count = min(one.clips, most, len(found))
    return [found[i * len(found) // count] for i in range(count)]


class Bench:
    """The full model and what it says, for one variant after the other."""

    def __init__(
        self, name: str, data: Path, most: int, results: dict[str, Any], show: Progress
    ) -> None:
        self.name, self.data, self.results, self.show = name, data, results, show
        self.full, self.processor = load_whisper(name)
        self.family = family_of(self.full)
        self.speech = {key: measured_speech(data, one, most) for key, one in SETS.items()}
        self.hidden: dict[str, list[torch.Tensor]] = {}
        self.tokens: dict[str, list[tuple[list[int], int]]] = {}

    def made(self, variant: str) -> tuple[Any, dict[str, Any]]:
        """The model of a variant and what making it took."""
        model, _ = load_whisper(self.name)
        if variant == FULL:
            return model, {}
        config = SAMLConfig(num_experts=0)
        if variant == PLAIN:
            report = apply_saml(model, config)
            return model, {"memory_bytes": report.memory_bytes}
        seed = int(variant.removeprefix("calibrated-"))
        started, cpu = time.monotonic(), time.process_time()
        chosen = choose_utterances(training_speech(self.data), seed=seed)
        bar = self.show.add_task(f"{variant}: hearing the clips", total=len(chosen))
        clips = prepare_clips(
            self.full,
            self.processor,
            chosen,
            seed,
            on_done=lambda count: self.show.advance(bar, count),
        )
        self.show.remove_task(bar)
        bar = self.show.add_task(f"{variant}: calibrating")
        calibration = calibrate(
            model,
            self.processor,
            clips,
            config,
            Recipe(),
            on_progress=lambda done, total, _: self.show.update(bar, completed=done, total=total),
        )
        self.show.remove_task(bar)
        report = apply_saml(model, config, calibration)
        return model, {
            "memory_bytes": report.memory_bytes,
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "calibration": calibration.about,
        }

    def measure(self, model: Any, key: str, kl_only: bool, label: str) -> dict[str, Any]:
        """KL, and WER if asked for, of one set."""
        model.saml_margin = SETS[key].margin
        found: dict[str, Any] = {"speakers": [u.speaker for u in self.speech[key]]}
        found["kl"], found["tokens"], found["agreement"] = self.divergence(model, key, label)
        if not kl_only:
            found["heard"] = self.hear(model, key, label)
            counted = word_errors([u.text for u in self.speech[key]], found["heard"])
            found["errors"] = [one.errors for one in counted]
            found["words"] = [one.words for one in counted]
        return found

    def hear(self, model: Any, key: str, label: str) -> list[str]:
        """Greedy transcripts of a set."""
        clips = [u.load() for u in self.speech[key]]
        bar = self.show.add_task(f"{label}: {key}, WER", total=len(clips))
        heard = decode_clips(
            model,
            self.processor,
            clips,
            language="en",
            on_done=lambda count: self.show.advance(bar, count),
        )
        self.show.remove_task(bar)
        return heard

    def prepare(self, key: str) -> None:
        """References in the model's style, and the full model's last hidden states for them."""
        if key in self.hidden:
            return
        self.full.saml_margin = SETS[key].margin
        first = self.results.get(FULL, {}).get(key, {})
        heard = first.get("heard") or self.results.get("style", {}).get(key)
        if not heard:
            heard = self.hear(self.full, key, FULL)
            self.results.setdefault("style", {})[key] = heard
        language = "en" if self.full.config.vocab_size > 51864 else None
        self.tokens[key] = [
            self.family.token_ids(self.processor, in_model_style(u.text, text), language)
            for u, text in zip(self.speech[key], heard, strict=True)
        ]
        self.hidden[key] = list(self.states(self.full, key, FULL))

    @torch.inference_mode()
    def states(self, model: Any, key: str, label: str) -> Iterable[torch.Tensor]:
        """Last hidden states of each clip's text tokens: [T, d]."""
        bar = self.show.add_task(f"{label}: {key}, KL", total=len(self.tokens[key]))
        for utterance, (tokens, prompt) in zip(self.speech[key], self.tokens[key], strict=True):
            clip = utterance.load()
            frames = clip_window(model, len(clip))
            features = log_mel(self.processor, [clip], frames)
            with audio_window(model, frames):
                yield model.model(
                    input_features=features,
                    decoder_input_ids=torch.tensor([tokens[:-1]]),
                    use_cache=False,
                ).last_hidden_state[0, prompt - 1 :]
            self.show.advance(bar)
        self.show.remove_task(bar)

    @torch.inference_mode()
    def divergence(
        self, model: Any, key: str, label: str
    ) -> tuple[list[float], list[int], list[int]]:
        """Of each clip: KL summed over tokens (nats), tokens, those with the same likeliest."""
        self.prepare(key)
        sums, counts, agreed = [], [], []
        for own, other in zip(self.hidden[key], self.states(model, key, label), strict=True):
            full = self.full.proj_out(own).log_softmax(dim=-1)
            rounded = model.proj_out(other).log_softmax(dim=-1)
            sums.append(round(float((full.exp() * (full - rounded)).sum()), 6))
            counts.append(len(own))
            agreed.append(int((full.argmax(dim=-1) == rounded.argmax(dim=-1)).sum()))
        return sums, counts, agreed


def mean_kl(found: dict[str, Any]) -> float:
    """Nats a token."""
    return float(sum(found["kl"]) / sum(found["tokens"]))


def wer(found: dict[str, Any]) -> float:
    """Per cent."""
    return 100.0 * sum(found["errors"]) / sum(found["words"])


def pooled_ratio(
    one: dict[str, Any], other: dict[str, Any], samples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """WER of one variant to that of another, all sets pooled, and its 95 % interval over speakers.

    Speakers are drawn with replacement, with all that they say, the same ones for both variants.
    """
    counts: dict[str, np.ndarray] = {}
    for key in SETS:
        speakers = one[key]["speakers"]
        for i, speaker in enumerate(speakers):
            row = np.array([one[key]["errors"][i], other[key]["errors"][i]], dtype=float)
            counts[speaker] = counts.get(speaker, 0) + row
    table = np.stack(list(counts.values()))
    draws = np.random.default_rng(seed).integers(len(table), size=(samples, len(table)))
    sums = table[draws].sum(axis=1)
    ratios = sums[:, 0] / np.maximum(sums[:, 1], 1)
    total = table.sum(axis=0)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(total[0] / max(total[1], 1)), float(low), float(high)


def table(results: dict[str, Any]) -> Table:
    """WER and KL by variant and set, and the pooled WER to that of full precision."""
    found = Table(title="WER %, KL in nats a token")
    found.add_column("variant")
    for key in SETS:
        found.add_column(key, justify="right")
    found.add_column("WER to full precision", justify="right")
    variants = {k: v for k, v in results.items() if k not in ("style", "about")}
    for name, sets in variants.items():
        cells = []
        for key in SETS:
            one = sets.get(key)
            heard = f"{wer(one):.2f}, " if one and "errors" in one else ""
            cells.append(f"{heard}{mean_kl(one):.4f}" if one else "")
        whole = all("errors" in v.get(k, {}) for v in (sets, variants.get(FULL, {})) for k in SETS)
        last = (
            "{:.3f} ({:.3f} to {:.3f})".format(*pooled_ratio(sets, variants[FULL])) if whole else ""
        )
        found.add_row(name, *cells, last)
    return found


def main(
    data: Annotated[Path, typer.Option(help="Holds vctk/, LibriSpeech/ and so on.")],
    json_file: Annotated[Path, typer.Option("--json", help="Results, added to.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    draws: Annotated[int, typer.Option(min=1, help="Of the calibration clips.")] = 3,
    only: Annotated[str | None, typer.Option(help="Variants, by commas.")] = None,
    sets: Annotated[str, typer.Option(help="By commas.")] = ",".join(SETS),
    clips: Annotated[int, typer.Option(min=1, help="Of a set at most; fewer are quicker.")] = 160,
    kl_only: Annotated[bool, typer.Option("--kl-only", help="Leave WER for later.")] = False,
) -> None:
    """Measure variants, one after the other, and print the table."""
    quiet_libraries()
    results: dict[str, Any] = json.loads(json_file.read_text()) if json_file.exists() else {}
    results["about"] = about(torch.device("cpu")) | {"model": model, "clips": clips}
    names = only.split(",") if only else [FULL, PLAIN, *(f"calibrated-{i}" for i in range(draws))]
    console = Console()
    with Progress(console=console, transient=True) as show:
        bench = Bench(model, data, clips, results, show)
        for name in names:
            done = results.setdefault(name, {})
            missing = [
                key
                for key in sets.split(",")
                if key not in done or not (kl_only or "errors" in done[key])
            ]
            if not missing:
                continue
            network, made = bench.made(name)
            results[name] |= {"made": made}
            for key in missing:
                done[key] = bench.measure(network, key, kl_only, name)
                write_json(json_file, results)
    console.print(table(results))


if __name__ == "__main__":
    typer.run(main)
