"""Short audio windows: no padding to 30 s of arithmetic where the clip is short.

Whisper's encoder insists on 3000 mel frames (30 s). The positions are added frame by frame and
attention has no fixed length, so a shorter window is the same network on fewer frames. Zero-shot,
the original weights answer short windows with repeated words; experts trained with them do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from saml_models.audio import SAMPLE_RATE

__all__ = ["FRAMES_PER_SECOND", "audio_window", "log_mel", "window_frames"]

FRAMES_PER_SECOND = 100
FULL_WINDOW = 3000
_STEP = 50  # windows are multiples of half a second, so that few shapes occur


def window_frames(samples: int, margin: float = 1.0) -> int:
    """Mel frames for a clip of `samples` at 16 kHz plus `margin` seconds, at most 3000."""
    frames = math.ceil((samples / SAMPLE_RATE + margin) * FRAMES_PER_SECOND / _STEP) * _STEP
    return min(FULL_WINDOW, frames)


def log_mel(processor: WhisperProcessor, clips: list[np.ndarray], frames: int) -> Tensor:
    """Whisper's log-mel features of clips (float32 [samples], 16 kHz): [B, mel bins, frames].

    Clips are padded with silence, or cut, to the window. Scaled as by `WhisperFeatureExtractor`.
    """
    features = processor.feature_extractor(
        clips,
        sampling_rate=SAMPLE_RATE,
        return_tensors="pt",
        padding="max_length",
        max_length=frames * SAMPLE_RATE // FRAMES_PER_SECOND,
        truncation=True,
    )
    return features.input_features


@contextmanager
def audio_window(model: WhisperForConditionalGeneration, frames: int) -> Iterator[None]:
    """Within the block the model's window is `frames` mel frames instead of 3000.

    `generate` and the encoder both read `config.max_source_positions`; positions beyond the window
    are left out. Everything is put back afterwards. One thread at a time.
    """
    config, encoder = model.config, model.model.encoder
    full, table = config.max_source_positions, encoder.embed_positions
    positions = frames // (encoder.conv1.stride[0] * encoder.conv2.stride[0])
    if positions >= full:
        yield
        return
    view = nn.Embedding.from_pretrained(table.weight[:positions], freeze=True)
    shared = {id(c): c for c in (config, encoder.config)}.values()
    try:
        for c in shared:
            c.max_source_positions = positions
        encoder.embed_positions = view
        yield
    finally:
        for c in shared:
            c.max_source_positions = full
        encoder.embed_positions = table


def audio_mask(lengths: list[int], frames: int, device: torch.device | str = "cpu") -> Tensor:
    """[B, frames / 2] bool: True where an encoder frame holds audio. `lengths` in samples."""
    steps = torch.tensor([math.ceil(n / SAMPLE_RATE * FRAMES_PER_SECOND / 2) for n in lengths])
    return (torch.arange(frames // 2) < steps.clamp(min=1).unsqueeze(1)).to(device)
