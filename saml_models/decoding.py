"""Clips of up to 30 s -> text, in batches of like length, through transformers' `generate`.

A clip's text does not depend on its company: each has its own window and its own limit of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    StoppingCriteria,
    StoppingCriteriaList,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from saml_models.audio import SAMPLE_RATE
from saml_models.window import (
    FULL_WINDOW,
    audio_mask,
    audio_window,
    log_mel,
    own_windows,
    window_frames,
)

__all__ = ["decode_clips"]

# English speech stays under 5 tokens a second; more is the model repeating itself.
TOKENS_PER_SECOND, SPARE_TOKENS = 8, 12
MAX_TOKENS = 440


class _OwnLimits(StoppingCriteria):
    """Each clip ends at its own limit of new tokens, all its beams with it."""

    def __init__(self, limits: Sequence[int]) -> None:
        self.limits, self.prompt = torch.tensor(limits), 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows, length = input_ids.shape
        self.prompt = self.prompt or length - 1  # asked first after one new token
        limits = self.limits.repeat_interleave(rows // len(self.limits))
        return (limits <= length - self.prompt).to(input_ids.device)


def token_limit(samples: int) -> int:
    """New tokens at most for a clip of `samples` at 16 kHz."""
    return min(MAX_TOKENS, int(samples / SAMPLE_RATE * TOKENS_PER_SECOND) + SPARE_TOKENS)


@torch.inference_mode()
def decode_clips(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[np.ndarray],
    *,
    beam_size: int = 1,
    language: str | None = None,
    batch_size: int = 24,
    on_done: Callable[[int], None] | None = None,
) -> list[str]:
    """Transcribe clips without timestamps, in the order given.

    Args:
        model: Whisper as loaded, or with SAML layers. A model whose experts were trained on short
            windows is given short ones; any other hears each clip padded to 30 s.
        processor: of that model.
        clips: float32 [samples] at 16 kHz, each at most 30 s.
        beam_size: 1 is greedy.
        language: of a multilingual model; None lets it detect.
        batch_size: clips decoded together; divided by the beam size.
        on_done: called with the number of clips done, after each batch.
    """
    short = bool(getattr(model, "saml_short_windows", False))
    routing = getattr(model, "saml_routing", None)
    texts = [""] * len(clips)
    order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
    size = max(1, batch_size // beam_size)
    multilingual = bool(getattr(model.generation_config, "is_multilingual", False))
    options: dict[str, Any] = {"language": language, "task": "transcribe"} if multilingual else {}
    was_training = model.training
    model.eval()
    for start in range(0, len(order), size):
        index = order[start : start + size]
        batch = [clips[i] for i in index]
        windows = [window_frames(len(c)) if short else FULL_WINDOW for c in batch]
        limits = [token_limit(len(c)) for c in batch]
        frames = max(windows)
        features = log_mel(processor, batch, frames).to(model.device, model.dtype)
        if routing is not None:
            routing.mask = audio_mask([len(c) for c in batch], frames, model.device)
        try:
            with audio_window(model, frames), own_windows(model, features, windows):
                tokens = model.generate(
                    features,
                    num_beams=beam_size,
                    max_new_tokens=max(limits),
                    stopping_criteria=StoppingCriteriaList([_OwnLimits(limits)]),
                    **options,
                )
        finally:
            if routing is not None:
                routing.mask = None
        found = processor.batch_decode(tokens, skip_special_tokens=True)
        for i, text in zip(index, found, strict=True):
            texts[i] = text.strip()
        if on_done:
            on_done(len(index))
    model.train(was_training)
    return texts
