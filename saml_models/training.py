"""One training loop for both stages: experts and routers learn, the base stays frozen.

Everything random in step i follows from (seed, i) alone, so a run that was killed and resumed ends
with the same weights as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from saml_kernels.errors import SAMLError
from saml_models.audio import SAMPLE_RATE
from saml_models.memory import keep_freed_memory
from saml_models.storage import read_tensors, round_experts, weight_hash, write_tensors
from saml_models.surgery import config_of, expert_parameters, routing_of
from saml_models.window import audio_mask, audio_window, log_mel, window_frames

__all__ = ["Sample", "TrainingOptions", "TrainingReport", "fit", "mixed_precision"]

IGNORED = -100  # cross_entropy's own mark for positions without a target


@dataclass(frozen=True)
class Sample:
    """One training clip: a function that loads it (float32, 16 kHz), its length and its text."""

    load: Callable[[], np.ndarray]
    seconds: float
    text: str


@dataclass(frozen=True)
class TrainingOptions:
    """How `fit` trains.

    Attributes:
        learning_rate: AdamW's peak, reached after `warmup` of the steps, then a cosine to 5 %.
        epochs: passes over the samples.
        batch_seconds: seconds of audio in a batch, padding included.
        max_batch: clips in a batch.
        warmup: share of the steps.
        weight_decay: AdamW's.
        clip_norm: gradients are clipped to this norm.
        speeds: a clip is resampled to one of these speeds.
        margins: seconds of silence after the clip; one is drawn for each batch.
        freq_masks, freq_width: SpecAugment (arXiv 1904.08779) over mel bins.
        time_masks, time_share: SpecAugment over time, each mask at most this share of the clip.
        average: the weights are averaged over this last share of the steps.
        anchor: weight of the squared distance to the starting experts.
        distil: share of the loss that is the divergence from a full-precision teacher's word
            probabilities (arXiv 1503.02531), which keeps many epochs from forgetting what it knows.
        seed: of everything random.
        checkpoint_every: steps between checkpoints, where a folder is given.
    """

    learning_rate: float = 1e-3
    epochs: int = 3
    batch_seconds: float = 100.0
    max_batch: int = 16
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    margins: tuple[float, ...] = (0.5, 1.0, 2.0)
    freq_masks: int = 2
    freq_width: int = 20
    time_masks: int = 2
    time_share: float = 0.1
    average: float = 0.0
    anchor: float = 0.0
    distil: float = 0.0
    seed: int = 0
    checkpoint_every: int = 25


@dataclass
class TrainingReport:
    """Steps done, seconds taken (of this process), loss of the first and last tenth of steps."""

    steps: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    last_loss: float = math.nan


def mixed_precision(device: torch.device) -> str:
    """The accelerate name of the fastest safe precision: "bf16", "fp16" or "no"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return "bf16"
    return "no"


class _Objective(nn.Module):
    """The loss as one module, so that accelerate can wrap it for several processes."""

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        options: TrainingOptions,
        teacher: WhisperForConditionalGeneration | None,
    ) -> None:
        super().__init__()
        self.model, self.anchor, self.distil = model, options.anchor, options.distil
        # In a tuple: a teacher is nobody's submodule, so that nothing of it is trained or saved.
        self.teacher = (teacher,)
        self.start = {n: p.detach().clone() for n, p in expert_parameters(model).items()}

    def forward(
        self, features: Tensor, clean: Tensor, mask: Tensor, inputs: Tensor, targets: Tensor
    ) -> Tensor:
        """The loss of one batch (scalar).

        Args:
            features: [B, mel, T], augmented.
            clean: the same without SpecAugment, for the teacher.
            mask: [B, T / 2] bool.
            inputs: token ids [B, L].
            targets: token ids [B, L], `IGNORED` where there is none.
        """
        routing = routing_of(self.model)
        routing.mask = mask
        kept = targets != IGNORED
        logits = _logits(self.model, features, inputs, kept)
        loss = F.cross_entropy(logits, targets[kept])
        (teacher,) = self.teacher
        if teacher is not None and self.distil > 0:
            with torch.no_grad():
                wanted = _logits(teacher, clean, inputs, kept).softmax(-1)
            apart = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")
            loss = (1 - self.distil) * loss + self.distil * apart
        balance = routing.balance_loss()
        routing.mask = None
        if balance is not None:
            loss = loss + config_of(self.model).balance * balance
        if self.anchor:
            for name, parameter in expert_parameters(self.model).items():
                loss = loss + self.anchor * (parameter - self.start[name]).square().sum()
        return loss


def _logits(
    model: WhisperForConditionalGeneration, features: Tensor, inputs: Tensor, kept: Tensor
) -> Tensor:
    """float32 logits [n, V] at the kept positions only: the head is half of a small model."""
    with audio_window(model, features.shape[-1]):
        hidden = model.model(
            input_features=features, decoder_input_ids=inputs, use_cache=False
        ).last_hidden_state
    return model.proj_out(hidden[kept]).float()


def fit(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    samples: Sequence[Sample],
    options: TrainingOptions,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    teacher: WhisperForConditionalGeneration | None = None,
) -> TrainingReport:
    """Train the model's experts and routers in place, then round them to their stored form.

    Args:
        model: treated by `apply_saml`.
        processor: of that model.
        samples: at least one.
        options: see `TrainingOptions`.
        checkpoint: a file to save progress to and resume from; removed when training ends.
        on_step: called with (steps done, steps in all, loss) after each.
        teacher: the full-precision model, where `options.distil` asks for one.

    Raises:
        SAMLError: nothing to train on, no teacher to distil, a checkpoint of another run, or a
            loss that is not finite.
    """
    if not samples:
        raise SAMLError("training: no clips; give at least one utterance with its text")
    if options.distil > 0 and teacher is None:
        raise SAMLError("training: distil needs the full-precision model as teacher")
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision(device))
    torch.manual_seed(options.seed)
    objective = _Objective(model, options, teacher)
    parameters = expert_parameters(model)
    optimiser = torch.optim.AdamW(
        parameters.values(),
        lr=options.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=options.weight_decay,
    )
    wrapped, prepared = accelerator.prepare(objective, optimiser)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    batches = plan_batches([s.seconds for s in samples], options)
    steps = math.ceil(len(batches) / ranks)
    average: dict[str, Tensor] = {}
    run = _fingerprint(model, samples, options)
    state = _State(checkpoint, parameters, objective.start, optimiser, average, run)
    done = state.resume()
    make = _BatchMaker(processor, samples, options)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    todo = [(i, batches[(i * ranks + rank) % len(batches)]) for i in range(done, steps)]
    try:
        for i, batch in _ahead(make, todo):
            rate = _learning_rate(i, steps, options)
            for group in optimiser.param_groups:
                group["lr"] = rate
            torch.manual_seed(options.seed * 1_000_003 + i * ranks + rank)
            with accelerator.autocast():
                loss = wrapped(*(t.to(accelerator.device) for t in batch))
            if not torch.isfinite(loss):
                raise SAMLError(f"training: the loss is {loss.item()} at step {i}; lower the rate")
            prepared.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters.values(), options.clip_norm)
            prepared.step()
            losses.append(loss.item())
            _update_average(average, parameters, i, steps, options)
            if (i + 1) % options.checkpoint_every == 0 and accelerator.is_main_process:
                state.save(i + 1)
            if on_step:
                on_step(i + 1, steps, losses[-1])
    finally:
        model.eval()
        routing_of(model).mask = None
    with torch.no_grad():
        for name, value in average.items():
            if name != "count":
                parameters[name].copy_(value)
    round_experts(model)
    state.remove()
    tenth = max(1, len(losses) // 10)
    return TrainingReport(
        steps,
        time.monotonic() - started,
        float(np.mean(losses[:tenth])) if losses else math.nan,
        float(np.mean(losses[-tenth:])) if losses else math.nan,
    )


def plan_batches(seconds: Sequence[float], options: TrainingOptions) -> list[list[int]]:
    """Batches of clips of like length for all epochs, a pure function of its arguments."""
    rng = random.Random(options.seed)
    batches: list[list[int]] = []
    for _ in range(options.epochs):
        order = sorted(range(len(seconds)), key=lambda i: seconds[i] + rng.random())
        epoch: list[list[int]] = []
        current: list[int] = []
        for i in order:
            longest = max(seconds[j] for j in [*current, i]) + 1.0
            full = longest * (len(current) + 1) > options.batch_seconds
            if current and (full or len(current) >= options.max_batch):
                epoch.append(current)
                current = []
            current.append(i)
        epoch.append(current)
        rng.shuffle(epoch)
        batches += epoch
    return batches


def _learning_rate(step: int, steps: int, options: TrainingOptions) -> float:
    warm = min(1.0, (step + 1) / max(1.0, options.warmup * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return options.learning_rate * warm * (0.05 + 0.95 * cosine)


@torch.no_grad()
def _update_average(
    average: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    step: int,
    steps: int,
    options: TrainingOptions,
) -> None:
    """Running mean of the weights over the last `options.average` of the steps."""
    if options.average <= 0 or step < steps * (1 - options.average):
        return
    count = average.setdefault("count", torch.zeros(()))
    count += 1
    for name, parameter in parameters.items():
        mean = average.setdefault(name, torch.zeros_like(parameter))
        mean += (parameter.detach() - mean) / count.to(mean.device)


class _BatchMaker:
    """Audio and text of a batch -> tensors; step i always makes the same ones."""

    def __init__(
        self, processor: WhisperProcessor, samples: Sequence[Sample], options: TrainingOptions
    ) -> None:
        self.processor, self.samples, self.options = processor, samples, options
        tokenizer = processor.tokenizer
        prefix, end = list(tokenizer.prefix_tokens), tokenizer.eos_token_id
        self.prefix, self.end = len(prefix), end
        self.ids = [
            [*prefix, *tokenizer(" " + s.text.strip(), add_special_tokens=False).input_ids, end]
            for s in samples
        ]

    def __call__(self, step: int, index: list[int]) -> tuple[Tensor, ...]:
        o = self.options
        rng = random.Random(f"{o.seed}/{step}")
        clips = [_at_speed(self.samples[i].load(), rng.choice(o.speeds)) for i in index]
        frames = window_frames(max(map(len, clips)), rng.choice(o.margins))
        clean = log_mel(self.processor, clips, frames)
        features = clean.clone()
        _spec_augment(features, [len(c) for c in clips], rng, o)
        texts = [self.ids[i][:448] for i in index]
        longest = max(map(len, texts))
        inputs = torch.full((len(index), longest - 1), self.end)
        targets = torch.full((len(index), longest - 1), IGNORED)
        for row, ids in enumerate(texts):
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[row, self.prefix - 1 : len(ids) - 1] = torch.tensor(ids[self.prefix :])
        return features, clean, audio_mask([len(c) for c in clips], frames), inputs, targets


def _at_speed(clip: np.ndarray, speed: float) -> np.ndarray:
    if speed == 1.0:
        return clip
    return soxr.resample(clip, SAMPLE_RATE, round(SAMPLE_RATE / speed)).astype(np.float32)


def _spec_augment(
    features: Tensor, lengths: list[int], rng: random.Random, options: TrainingOptions
) -> None:
    """Mask bands of mel bins and stretches of time by each clip's mean, in place."""
    bins = features.shape[1]
    for row, samples in enumerate(lengths):
        clip = features[row, :, : max(1, samples * 100 // SAMPLE_RATE)]
        mean, frames = clip.mean(), clip.shape[1]
        for _ in range(options.freq_masks):
            width = rng.randint(0, options.freq_width)
            start = rng.randint(0, bins - width)
            clip[start : start + width] = mean
        for _ in range(options.time_masks):
            width = rng.randint(0, int(min(100, frames * options.time_share)))
            start = rng.randint(0, frames - width)
            clip[:, start : start + width] = mean


def _ahead(
    make: _BatchMaker, todo: list[tuple[int, list[int]]]
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Make the next batch in a thread while the current one is trained on."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(make, *todo[0])] if todo else []
        for position, (step, _) in enumerate(todo):
            ready = pending.pop()
            if position + 1 < len(todo):
                pending.append(pool.submit(make, *todo[position + 1]))
            yield step, ready.result()


def _fingerprint(model: nn.Module, samples: Sequence[Sample], options: TrainingOptions) -> str:
    """What must be equal for a checkpoint to be resumed."""
    clips = [(round(s.seconds, 3), s.text) for s in samples]
    settings = asdict(replace(options, checkpoint_every=0))
    made_for = [weight_hash(model), config_of(model).to_dict()]
    return json.dumps([settings, clips, made_for], sort_keys=True)


class _State:
    """Parameters, where they started, AdamW's moments and the running average in one file."""

    def __init__(
        self,
        path: Path | None,
        parameters: dict[str, nn.Parameter],
        start: dict[str, Tensor],
        optimiser: torch.optim.Optimizer,
        average: dict[str, Tensor],
        fingerprint: str,
    ) -> None:
        self.path, self.parameters, self.start = path, parameters, start
        self.optimiser, self.average, self.fingerprint = optimiser, average, fingerprint

    def save(self, step: int) -> None:
        if self.path is None:
            return
        tensors = {f"parameter/{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"start/{n}": t for n, t in self.start.items()}
        tensors |= {f"average/{n}": t for n, t in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser/{key}/{name}"] = value
        write_tensors(self.path, tensors, {"step": str(step), "run": self.fingerprint})

    @torch.no_grad()
    def resume(self) -> int:
        """Steps already done, with everything restored; 0 where there is no checkpoint."""
        if self.path is None or not self.path.exists():
            return 0
        tensors, about = read_tensors(self.path)
        if about.get("run") != self.fingerprint:
            raise SAMLError(
                f"{self.path}: belongs to a run with other data or options; repeat those, or "
                "remove the file to start anew"
            )
        try:
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameter/{name}"])
                self.start[name].copy_(tensors[f"start/{name}"])
                self.optimiser.state[parameter] = {
                    key: self._like(tensors[f"optimiser/{key}/{name}"], parameter)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
            for key, value in tensors.items():
                if key.startswith("average/"):
                    self.average[key.removeprefix("average/")] = value.clone()
            return int(about["step"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise SAMLError(f"{self.path}: damaged checkpoint ({error}); remove it") from error

    @staticmethod
    def _like(value: Tensor, parameter: nn.Parameter) -> Any:
        return value.clone() if value.dim() == 0 else value.to(parameter.device).clone()

    def remove(self) -> None:
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
