"""Clips with their text -> the batches of training, each a pure function of its number."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saml_models.data.audio import MAX_SAMPLES, at_speed
from saml_models.data.noise import BABBLERS, babble, hum, in_room, mixed, pink
from saml_models.models.interface import SpeechModel

if TYPE_CHECKING:
    from saml_models.training.options import TrainingOptions

__all__ = [
    "IGNORED",
    "Batch",
    "BatchMaker",
    "Sample",
    "Shapes",
    "SoftTargets",
    "plan_batches",
    "speaker_numbers",
]

IGNORED = -100  # cross_entropy's own mark for positions without a target


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's part in what a clip's n tokens are to be, the text's after the prompt.

    Attributes:
        ids: int [n, k], tokens that it finds likely.
        shares: float32 [n, k], of each in the target; what is left of 1 is the text's own token's.
    """

    ids: np.ndarray
    shares: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One training clip: a function that loads it (float32, 16 kHz), its length and its text.

    `language` is that of the prompt: see `SpeechModel.prompt_language`. Of several clips trained on
    together all have a teacher, or none. `speaker` tells voices apart where each has something of
    its own (`TrainingOptions.speaker_rate`).
    """

    load: Callable[[], np.ndarray]
    seconds: float
    text: str
    language: str | None = None
    teacher: SoftTargets | None = None
    speaker: str = ""


@dataclass(frozen=True)
class Shapes:
    """What sizes of a batch are rounded up to, so that few shapes occur: frames and tokens.

    With `dense` the logits of all positions are wanted, and those without a target are ignored.
    """

    frames: int = 1
    tokens: int = 1
    dense: bool = False


@dataclass(frozen=True)
class Batch:
    """What one training step is made of; B clips, T frames, L tokens.

    Attributes:
        features: as `SpeechModel.collate` makes them, augmented.
        mask: [B, frames] bool, True where there is audio.
        inputs: token ids int64 [B, L].
        targets: token ids int64 [B, L], `IGNORED` where there is none.
        kept: int64 [n], the positions in [B * L] whose logits are wanted.
        soft_ids, soft_shares: a teacher's tokens int64 and their shares float32 in the targets, [B,
            L, k]; k is 0 without one.
        speakers: int32 [B], from 1 on in the order of their names; 0 is nobody.
        words: where each clip's targets begin and end in its row, the end of the text left out.
    """

    features: Tensor
    mask: Tensor
    inputs: Tensor
    targets: Tensor
    kept: Tensor
    soft_ids: Tensor
    soft_shares: Tensor
    speakers: Tensor
    words: tuple[tuple[int, int], ...]

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the batch, in the order in which `holding` takes them."""
        rest = self.soft_ids, self.soft_shares, self.speakers
        return self.features, self.mask, self.inputs, self.targets, self.kept, *rest

    def holding(self, tensors: Sequence[Tensor]) -> Batch:
        """The same batch in other tensors, given in the same order."""
        features, mask, inputs, targets, kept, soft_ids, soft_shares, speakers = tensors
        return Batch(
            features, mask, inputs, targets, kept, soft_ids, soft_shares, speakers, self.words
        )

    def pinned(self) -> Batch:
        """In memory that a CUDA device copies from while the processor goes on."""
        return self.holding([t.pin_memory() for t in self.tensors()])

    def to(self, device: torch.device) -> Batch:
        """On a device; from pinned memory without waiting for the copies."""
        return self.holding([t.to(device, non_blocking=True) for t in self.tensors()])


def plan_batches(seconds: Sequence[float], options: TrainingOptions) -> list[list[int]]:
    """Batches of clips of like length for all epochs, a pure function of its arguments.

    Args:
        seconds: of each clip.
        options: say how many epochs, and how large a batch is.
    """
    rng = random.Random(options.seed)
    batches: list[list[int]] = []
    for _ in range(options.epochs):
        order = sorted(range(len(seconds)), key=lambda i: seconds[i] + rng.random())
        epoch: list[list[int]] = []
        current: list[int] = []
        for i in order:
            padded = max(seconds[j] for j in [*current, i]) + 1.0
            full = padded * (len(current) + 1) > options.batch_seconds
            if current and (full or len(current) >= options.max_batch):
                epoch.append(current)
                current = []
            current.append(i)
        if current:
            epoch.append(current)
        rng.shuffle(epoch)
        batches += epoch
    return batches


def speaker_numbers(samples: Sequence[Sample]) -> dict[str, int]:
    """Numbers from 1 on by speaker."""
    return {name: n for n, name in enumerate(sorted({s.speaker for s in samples}), start=1)}


class BatchMaker:
    """Audio and text of a batch -> tensors; step i always makes the same ones."""

    def __init__(
        self,
        speech: SpeechModel,
        samples: Sequence[Sample],
        options: TrainingOptions,
        shapes: Shapes | None = None,
    ) -> None:
        self.speech, self.samples, self.options = speech, samples, options
        self.shapes = shapes or Shapes()
        self.texts = [speech.token_ids(s.text, s.language) for s in samples]
        self.speakers = speaker_numbers(samples)

    def __call__(self, step: int, index: list[int]) -> Batch:
        """The batch of these clips at this step, on the CPU."""
        o, speech, shapes = self.options, self.speech, self.shapes
        rng = random.Random(f"{o.seed}/{step}")
        clips = [self._prepared(i, rng, step) for i in index]
        margin = rng.choice(o.margins)
        features, mask = speech.collate(clips, margin, shapes.frames)
        _spec_augment(speech.mel(features), [speech.frames(c) for c in clips], rng, o)
        texts = [self.texts[i] for i in index]
        longest = max(len(ids) for ids, _ in texts) - 1
        longest += -longest % shapes.tokens
        inputs = torch.full((len(index), longest), texts[0][0][-1])
        targets = torch.full((len(index), longest), IGNORED)
        for row, (ids, prompt) in enumerate(texts):
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[row, prompt - 1 : len(ids) - 1] = torch.tensor(ids[prompt:])
        flat = targets.flatten()
        kept = torch.arange(len(flat)) if shapes.dense else (flat != IGNORED).nonzero().flatten()
        words = tuple((prompt - 1, len(ids) - 2) for ids, prompt in texts)
        soft = self._soft(index, words, longest)
        speakers = self._speakers(step, index)
        return Batch(features, mask, inputs, targets, kept, *soft, speakers, words)

    def _speakers(self, step: int, index: list[int]) -> Tensor:
        """Whose each clip is, but for those that are learnt from as nobody's."""
        draw = random.Random(f"{self.options.seed}/{step}/speakers")
        own = [self.speakers[self.samples[i].speaker] for i in index]
        known = [n if draw.random() >= self.options.anonymous else 0 for n in own]
        return torch.tensor(known, dtype=torch.int32)

    def _soft(
        self, index: list[int], words: tuple[tuple[int, int], ...], longest: int
    ) -> tuple[Tensor, Tensor]:
        """The teacher's part in the targets of these clips."""
        teachers = [self.samples[i].teacher for i in index]
        width = max(0 if one is None else one.ids.shape[1] for one in teachers)
        ids = torch.zeros((len(index), longest, width), dtype=torch.int64)
        shares = torch.zeros((len(index), longest, width))
        for row, (one, (begin, end)) in enumerate(zip(teachers, words, strict=True)):
            if one is not None:  # the end of the text has a target too
                ids[row, begin : end + 1] = torch.from_numpy(one.ids).long()
                shares[row, begin : end + 1] = torch.from_numpy(one.shares)
        return ids, shares

    def _prepared(self, i: int, rng: random.Random, step: int) -> Tensor:
        samples, speed = self.samples[i].load(), rng.choice(self.options.speeds)
        if len(samples) <= MAX_SAMPLES * speed:  # else its end, which the text has, would be cut
            samples = at_speed(samples, speed)
        if self.options.rooms > 0:
            draw = np.random.default_rng((self.options.seed, step, i, 1))
            if draw.random() < self.options.rooms:
                samples = in_room(samples, draw)
        if self.options.noise > 0:
            draw = np.random.default_rng((self.options.seed, step, i))
            if draw.random() < self.options.noise:
                samples = self._in_noise(samples, draw)
        return self.speech.prepare(samples)

    def _in_noise(self, samples: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        kind = draw.choice(("white", "pink", "hum", "babble"))
        if kind == "babble":
            others = draw.integers(len(self.samples), size=BABBLERS)
            noise = babble([self.samples[j].load() for j in others], len(samples), draw)
        elif kind == "hum":
            noise = hum(len(samples), draw)
        else:
            noise = draw.standard_normal(len(samples))
            noise = pink(noise) if kind == "pink" else noise
        return mixed(samples, noise, draw.uniform(*self.options.noise_decibels))


def _spec_augment(
    mel: Tensor, frames: list[int], rng: random.Random, options: TrainingOptions
) -> None:
    """Mask bands of mel bins and stretches of time by each clip's mean, in place.

    Args:
        mel: [B, mel bins, T].
        frames: of each clip that hold audio.
        rng: draws the masks.
        options: says how many, and how wide.
    """
    bins = mel.shape[1]
    for row, length in enumerate(frames):
        clip = mel[row, :, :length]
        mean, heard = clip.mean(), clip.shape[1]
        for _ in range(options.freq_masks):
            width = rng.randint(0, options.freq_width)
            start = rng.randint(0, bins - width)
            clip[start : start + width] = mean
        for _ in range(options.time_masks):
            width = rng.randint(0, int(min(100, heard * options.time_share)))
            start = rng.randint(0, heard - width)
            clip[:, start : start + width] = mean
