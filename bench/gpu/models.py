"""Whole models on a GPU, for check.py: encoder, token, training step; clips, adaptation.

The model is a folder that `saml quantize` wrote, or a Whisper with random weights, which costs what
one with real weights does. Beside it runs the same Whisper with random weights in full precision
(float16 on a GPU); steps of training also beside what bench/models/adapters.py makes of that.
What reads audio is imported by the parts that hear it: a GPU's machine may lack it.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from transformers import WhisperForConditionalGeneration

from bench.gpu.results import Sheet, lost, one_line, within
from bench.layers.checks import peak_memory
from bench.models.adapters import ADAPTERS, Trainer
from bench.models.training_step import network
from bench.models.turns import stopwatch
from saml_kernels import SAMLConfig
from saml_kernels.timing import Train, captured, interleaved, sample
from saml_models.compress.apply import apply_saml

if TYPE_CHECKING:
    from saml_models.data.corpora import Utterance

__all__ = ["PARTS", "SMALL", "ModelSizes", "Place", "measure"]

PEERS = ("bitsandbytes + gated PEFT", "bitsandbytes + PEFT LoRA", "PEFT LoRA")
SIZE = "base"  # of a model with random weights
WITHOUT_GRAPHS = "without"  # in the warnings of what goes on without CUDA graphs


@dataclass(frozen=True)
class ModelSizes:
    """How much of each is measured.

    Attributes:
        batches: windows of 30 s at once, of the encoder and of decoding.
        tokens: two lengths of text; a token's time is the difference over their distance.
        train: windows of 30 s in a training step; text: tokens of each.
        rounds: samples of each contender.
        clips: of speech that are transcribed.
        learn, test: clips of one speaker to adapt to, and to test on; epochs: passes, None for the
            released number.
    """

    batches: tuple[int, ...] = (1, 8)
    tokens: tuple[int, int] = (8, 40)
    train: int = 8
    text: int = 32
    rounds: int = 5
    clips: int = 24
    learn: int = 20
    test: int = 12
    epochs: int | None = None


SMALL = ModelSizes((1,), (1, 2), train=1, text=4, rounds=1, clips=2, learn=2, test=1, epochs=1)


@dataclass(frozen=True)
class Place:
    """What is measured, and where; without a folder, a model with random weights."""

    folder: Path | None
    device: torch.device
    sizes: ModelSizes
    speech: Path | None = None

    def quantised(self) -> tuple[Any, Any]:
        """The model in its folder and its processor; None for one with random weights."""
        if self.folder is None:
            torch.manual_seed(0)
            model: Any = network(SIZE, self.device)
            apply_saml(model, SAMLConfig(expert_init="lora"))
            return model, None
        from saml_models.compress.loading import load_model

        return load_model(self.folder, self.device)

    def half(self, model: Any) -> Any:
        """To transcribe with: float16 on a GPU."""
        return (model.half() if self.device.type == "cuda" else model).eval()

    def plain(self, model: Any) -> Any:
        """The same Whisper with random weights in float32."""
        with self.device:
            made = WhisperForConditionalGeneration(model.config)
        made.generation_config = model.generation_config
        return made

    def pair(self) -> dict[str, Any]:
        """Both, ready to transcribe."""
        model = self.half(self.quantised()[0])
        return {"dense": self.half(self.plain(model)), "saml": model}

    def windows(self, model: Any, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise as log-mel features [batch, mel bins, frames], and the mask of all of it."""
        bins, frames = model.config.num_mel_bins, 2 * model.config.max_source_positions
        features = torch.randn(batch, bins, frames, dtype=model.dtype, device=self.device)
        return features, torch.ones(batch, frames // 2, dtype=torch.bool, device=self.device)


@torch.no_grad()
def encoder(place: Place) -> list[dict[str, Any]]:
    """Microseconds of the encoder, called from Python and as a CUDA graph."""
    rows: list[dict[str, Any]] = []
    pair = place.pair()
    for batch in place.sizes.batches:
        features, _ = place.windows(pair["saml"], batch)
        calls = {name: partial(model.model.encoder, features) for name, model in pair.items()}
        eager: dict[str, Train] = {name: [call] for name, call in calls.items()}
        modes = {"eager": eager}
        if place.device.type == "cuda":
            modes["graph"] = {name: [captured(train)] for name, train in eager.items()}
        for mode, trains in modes.items():
            sampler = partial(sample, launches=mode == "eager")
            times = interleaved(trains, place.device, place.sizes.rounds, sampler=sampler)
            rows += [
                {"contender": name, "batch": batch, "mode": mode, **found.to_dict(),
                 "ratio": round(found.ratio(times["dense"]), 4),
                 "weight_bytes": held(pair[name]),
                 "peak_bytes": peak_memory(calls[name], place.device)}
                for name, found in times.items()
            ]  # fmt: skip
    return rows


def held(model: Any) -> int:
    """Bytes of a model's parameters and buffers."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())


def decode(model: Any, window: tuple[torch.Tensor, torch.Tensor], length: int) -> None:
    """Texts of so many tokens of each clip, as `greedy` says them the first time.

    Of noise and random weights texts are loops, which it would say again, many times over.
    """
    from saml_models.models.whisper import greedy

    generation = model.generation_config
    language = "en" if getattr(generation, "is_multilingual", False) else None
    with torch.inference_mode(), patch.object(greedy, "repeated", lambda ids: 0):
        prompt, decoder = greedy._listen(model, [window], language, length)
        texts = greedy._say(greedy.Step(generation, decoder, prompt), [length] * len(prompt))
    if any(len(text) != length for text in texts):
        raise AssertionError(f"texts of {[len(text) for text in texts]} tokens, not {length}")


def token(place: Place) -> list[dict[str, Any]]:
    """Milliseconds of one more token of text, as `saml transcribe` decodes."""
    rows = []
    pair = place.pair()
    generation = pair["saml"].generation_config
    ends = generation.eos_token_id
    # Texts that never end: each has as many tokens as it may.
    never = [*(generation.suppress_tokens or ()), *(ends if isinstance(ends, list) else [ends])]
    generation.suppress_tokens = [token for token in never if token is not None]
    short, long = lengths = place.sizes.tokens
    for batch in place.sizes.batches:
        window = place.windows(pair["saml"], batch)
        found: dict[str, list[float]] = {name: [] for name in pair}
        for turn in range(-1, place.sizes.rounds):
            for name, model in pair.items():
                runs = (partial(decode, model, window, n) for n in lengths)
                seconds = [stopwatch(run, place.device)[0] for run in runs]
                if turn >= 0:
                    found[name].append((seconds[1] - seconds[0]) / (long - short) * 1e3)
        bar = statistics.median(found["dense"])
        rows += [
            {"contender": name, "batch": batch, "milliseconds": round(statistics.median(ms), 4),
             "samples": [round(one, 4) for one in ms],
             "ratio": round(statistics.median(ms) / bar, 4),
             "peak_bytes": peak_memory(partial(decode, pair[name], window, long), place.device)}
            for name, ms in found.items()
        ]  # fmt: skip
    return rows


def training(place: Place) -> list[dict[str, Any]]:
    """Milliseconds of forward, backward and AdamW: bfloat16 autocast on a GPU, else float32."""
    sizes, device = place.sizes, place.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, _ = place.quantised()
    rank = model.saml.config.rank
    features, _ = place.windows(model, sizes.train)
    labels = torch.randint(0, model.config.vocab_size, (sizes.train, sizes.text), device=device)
    trainers, rows = {}, []
    for name in ("saml", *PEERS):
        try:
            if name == "saml":
                network = model.requires_grad_(False)
                for parameter in model.saml.experts().values():
                    parameter.requires_grad_(True)
            else:
                network = ADAPTERS[name](place.plain(model), dtype, rank)
            trainers[name] = Trainer(network.train(), device)
            trainers[name].step(features, labels)
        except TimeoutError:
            raise
        except Exception as error:  # peers fail in ways of their own
            if name == "saml":
                raise
            trainers.pop(name, None)
            rows.append({"contender": name, "not run": one_line(error)})
    found: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(sizes.rounds):
        for name, trainer in trainers.items():
            run = partial(trainer.step, features, labels)
            found[name].append(stopwatch(run, device)[0] * 1e3)
    return rows + [
        {"contender": name, "batch": sizes.train, "milliseconds": round(statistics.median(ms), 3),
         "samples": [round(one, 3) for one in ms],
         "trained": sum(p.numel() for p in trainers[name].parameters),
         "weight_bytes": held(trainers[name].model),
         "peak_bytes": peak_memory(partial(trainers[name].step, features, labels), device)}
        for name, ms in found.items()
    ]  # fmt: skip


def clips(place: Place) -> dict[str, Any]:
    """Seconds to transcribe clips together, and what was heard."""
    from bench.models.clips import at_once, spread

    model, processor = place.quantised()
    model = place.half(model)
    chosen = spread(at_once(_utterances(place)), place.sizes.clips)
    audio = [u.load() for u in chosen]
    first, _ = stopwatch(lambda: _heard(model, processor, audio), place.device)  # compiles
    seconds, texts = stopwatch(lambda: _heard(model, processor, audio), place.device)
    spoken = sum(map(len, audio)) / 16000
    return {
        "clips": len(audio), "speech_seconds": round(spoken, 1), "seconds": round(seconds, 3),
        "first_seconds": round(first, 3), "real_time_factor": round(seconds / spoken, 5),
        "wer": _wer(chosen, texts), "texts": texts,
    }  # fmt: skip


def adaptation(place: Place) -> dict[str, Any]:
    """Seconds to adapt to the first speaker who has clips enough; WER before and after."""
    from saml_models.training.adapt import adapt, options_for

    sizes = place.sizes
    by_speaker: dict[str, list[Utterance]] = {}
    for utterance in _utterances(place):
        by_speaker.setdefault(utterance.speaker, []).append(utterance)
    needed = sizes.learn + sizes.test
    own = max(by_speaker.values(), key=lambda us: min(len(us), needed))
    learn, test = own[: sizes.learn], own[sizes.learn : needed]
    model, processor = place.quantised()
    options = options_for("experts", model)
    if sizes.epochs is not None:
        options = replace(options, epochs=sizes.epochs)
    audio = [u.load() for u in test]
    before = _wer(test, _heard(model, processor, audio))
    torch.manual_seed(0)
    seconds, profile = stopwatch(
        lambda: adapt(model, processor, learn, options, guard=False), place.device
    )
    profile.apply(model)
    return {
        "speaker": own[0].speaker, "clips": len(learn), "tested": len(test),
        "seconds": round(seconds, 2), "steps": profile.about.get("steps"),
        "loss": profile.about.get("loss"), "wer_before": before,
        "wer_after": _wer(test, _heard(model, processor, audio)),
    }  # fmt: skip


def _utterances(place: Place) -> list[Utterance]:
    from saml_models.data.corpora import load_corpus

    assert place.speech is not None
    return load_corpus(place.speech)


def _heard(model: Any, processor: Any, audio: list[Any]) -> list[str]:
    from saml_models.transcription.recordings import transcribe_many

    multilingual = getattr(model.generation_config, "is_multilingual", False)
    language = "en" if multilingual else None
    found = transcribe_many(model, processor, audio, language=language, timestamps=False)
    return [t.text for t in found]


def _wer(utterances: list[Utterance], texts: list[str]) -> float | str:
    try:
        from saml_models.text.wer import pooled, word_errors
    except ImportError as error:  # a GPU's machine may lack what only counting needs
        return one_line(error)
    return round(float(pooled(word_errors([u.text for u in utterances], texts)).wer), 2)


def measure(
    parts: dict[str, Callable[[Place], Any]], place: Place, sheet: Sheet, seconds: float
) -> str:
    """Run parts in turn, each within its share of what is left; one line about all of them."""
    deadline, said = time.monotonic() + seconds, []
    for i, (name, part) in enumerate(parts.items()):
        started = time.monotonic()
        share = (deadline - started) / (len(parts) - i)
        notes: list[str] = []
        try:
            if share < 1:
                raise TimeoutError("no time is left")
            with within(share), warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                found = part(place)
            told = _brief(found)
            notes = [str(w.message) for w in warned if WITHOUT_GRAPHS in str(w.message)]
            notes = list(dict.fromkeys(note for note in notes if "graph" in note.lower()))
        except ModuleNotFoundError as error:
            found = {"not run": one_line(error)}
            told = f"not run: {one_line(error)}"
        except Exception as error:  # whatever goes wrong, the next may go right
            gone = "; the device is lost to this process" if lost() else ""
            told = f"failed: {one_line(error)}{gone}"
            found = {"failed": one_line(error) + gone}
        # A pass that cannot be captured is slower, and no error where users meet it.
        told += "".join(f"; failed: {note}" for note in notes)
        said.append(f"{name} {told}")
        sheet.put(name, found)
        spent = {"seconds": round(time.monotonic() - started, 1)}
        sheet.put(f"{name}, all of it", spent | ({"warned": notes} if notes else {}))
        gc.collect()
        if place.device.type == "cuda" and not lost():
            torch.cuda.empty_cache()
    return "; ".join(said)


def _brief(found: Any) -> str:
    """The least that tells something: times over the first contender's, or the seconds."""
    if isinstance(found, dict):
        keys = ("seconds", "wer", "wer_before", "wer_after")
        return ", ".join(f"{key} {found[key]}" for key in keys if key in found)
    told = []
    for row in found:
        if "not run" in row:
            continue
        where = " ".join(str(row[k]) for k in ("mode", "batch") if k in row)
        ms = row["median_us"] / 1e3 if "median_us" in row else row["milliseconds"]
        told.append(f"{row['contender']} ({where}) {ms:.3g} ms")
    return ", ".join(told)


PARTS: dict[str, dict[str, Callable[[Place], Any]]] = {
    "models": {"encoder": encoder, "token": token, "training step": training},
    "speech": {"clips": clips, "adaptation": adaptation},
}
