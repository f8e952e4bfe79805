"""Short audio windows: no padding to 30 s of arithmetic where the clip is short.

Whisper's encoder insists on 3000 mel frames (30 s). The positions are added frame by frame and
attention has no fixed length, so a shorter window is the same network on fewer frames. Zero-shot,
the original weights answer short windows with repeated words; experts trained with them do not.

One rule, `margin_of`, says what window a clip of up to 30 s is heard in, by every way of decoding
(greedy or with beams, with times or without, by itself or in a batch) and in training:

* a model as released: 30 s;
* quantised, without experts that know short windows: the clip and 10 s of silence;
* experts that were trained on short windows: the clip and 1 s. They are trained with 0.5, 1 or 2 s
  after the longest clip of a batch, so that a clip's neighbours do not matter.

Longer recordings are heard 30 s at a time by all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from saml_models.data.audio import SAMPLE_RATE
from saml_models.models.interface import SHORT_WINDOW_MARGIN, margin_of

__all__ = [
    "FRAMES_PER_SECOND",
    "audio_window",
    "clip_window",
    "log_mel",
    "own_windows",
    "window_frames",
]

FRAMES_PER_SECOND = 100

FULL_WINDOW = 3000

_STEP = 50  # windows are multiples of half a second, so that few shapes occur


def window_frames(samples: int, margin: float = SHORT_WINDOW_MARGIN, step: int = 1) -> int:
    """Mel frames for a clip of `samples` at 16 kHz plus `margin` seconds, at most 3000.

    They are a multiple of half a second's, and of `step`.
    """
    step = math.lcm(step, _STEP)
    frames = math.ceil((samples / SAMPLE_RATE + margin) * FRAMES_PER_SECOND / step) * step
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


def clip_window(model: nn.Module, samples: int) -> int:
    """Mel frames of the window in which a model hears a clip of `samples`: see `margin_of`."""
    margin = margin_of(model)
    return FULL_WINDOW if margin is None else window_frames(samples, margin)


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


@contextmanager
def own_windows(
    model: WhisperForConditionalGeneration, features: Tensor, frames: Sequence[int]
) -> Iterator[None]:
    """Within the block each row of a batch hears its own window, as if it were alone.

    Nothing beyond a row's window reaches it: not the convolutions, a Conformer's among them (which
    see the zeros that they pad with), nor the attention of encoder or decoder. Where beams multiply
    a row, they follow it.

    Args:
        model: in `audio_window` of the longest.
        features: [B, mel bins, max(frames)]; zeroed in place beyond each row's window.
        frames: mel frames of each row's window, even numbers.
    """
    longest = features.shape[-1]
    if min(frames) == longest:
        yield
        return
    encoder: Any = model.model.encoder
    stride = encoder.conv2.stride[0]
    inside = torch.arange(longest) < torch.tensor(frames).unsqueeze(1)
    inside = inside.to(features.device)
    features.mul_(inside.unsqueeze(1))
    keys = torch.zeros(len(frames), 1, 1, longest // stride, device=features.device)
    keys = keys.masked_fill(~inside[:, None, None, ::stride], torch.finfo(torch.float16).min)

    @cache
    def mask(rows: int, dtype: torch.dtype) -> Tensor:
        return keys.repeat_interleave(rows // len(frames), dim=0).to(dtype)

    def convolve(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Of [B, channels, T] at either rate."""
        return (args[0] * inside[:, None, :: longest // args[0].shape[-1]],)

    def attend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return args, kwargs | {"attention_mask": mask(hidden.shape[0], hidden.dtype)}

    attentions = [layer.self_attn for layer in encoder.layers]
    attentions += [layer.encoder_attn for layer in model.model.decoder.layers]
    convolutions = [encoder.conv2]
    convolutions += [m for m in encoder.layers.modules() if isinstance(m, nn.Conv1d)]
    hooks = [m.register_forward_pre_hook(convolve) for m in convolutions]
    hooks += [m.register_forward_pre_hook(attend, with_kwargs=True) for m in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def audio_mask(lengths: list[int], frames: int, device: torch.device | str = "cpu") -> Tensor:
    """[B, frames / 2] bool: True where an encoder frame holds audio. `lengths` in samples."""
    steps = torch.tensor([math.ceil(n / SAMPLE_RATE * FRAMES_PER_SECOND / 2) for n in lengths])
    return (torch.arange(frames // 2) < steps.clamp(min=1).unsqueeze(1)).to(device)
