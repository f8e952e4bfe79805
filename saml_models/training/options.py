"""How a training run is set, and what it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["TrainingOptions", "TrainingReport"]


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
        speeds: a clip is resampled to one of these speeds, unless it would last over 30 s.
        margins: seconds of silence after the clip; one is drawn for each batch.
        freq_masks, freq_width: SpecAugment (arXiv 1904.08779) over mel bins.
        time_masks, time_share: SpecAugment over time, each mask at most this share of the clip.
        noise: share of the clips that are mixed with noise: white, pink, a mains hum, or other
            clips' voices.
        noise_decibels: range of the ratio of speech to noise.
        rooms: share of the clips that are heard through a random room and microphone.
        teacher: share of the target that is the full-precision model's own distribution at the
            tokens that it finds likeliest itself, where the samples have it (`taught`).
        speaker_rate: in `pretrain`, the learning rate of an offset [E] to each router's logits,
            each training speaker's own and forgotten in the end: the experts learn what voices
            share (speaker-adaptive training, arXiv 2206.12045, with gates for LHUC's scales). 0:
            none.
        anonymous: share of the clips that are learnt from without that offset.
        average: the weights are averaged over this last share of the steps.
        ctc: share of the loss that is the encoder's CTC loss (arXiv 1609.06773), where the model
            has a CTC head.
        seed: of everything random.
        checkpoint_every: steps between checkpoints, where a folder is given.
        cuda_graphs: whether forward and backward of a batch's shape are captured when it comes
            again, which rounds the batches' sizes up; None is yes on a GPU where that is possible.
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
    noise: float = 0.0
    noise_decibels: tuple[float, float] = (5.0, 20.0)
    rooms: float = 0.0
    teacher: float = 0.0
    speaker_rate: float = 0.0
    anonymous: float = 0.5
    average: float = 0.0
    ctc: float = 0.3
    seed: int = 0
    checkpoint_every: int = 25
    cuda_graphs: bool | None = None


@dataclass
class TrainingReport:
    """Steps done, seconds taken (of this process), loss of the first and last tenth of steps."""

    steps: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    last_loss: float = math.nan
