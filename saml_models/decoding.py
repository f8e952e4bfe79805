"""Clips of up to 30 s -> text, in batches of like length, through transformers' `generate`.

A clip's text does not depend on its company: each has its own window and its own limit of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from saml_models.families import family_of

__all__ = ["decode_clips"]


@torch.inference_mode()
def decode_clips(
    model: Any,
    processor: Any,
    clips: Sequence[np.ndarray],
    *,
    beam_size: int = 1,
    language: str | None = None,
    batch_size: int = 24,
    on_done: Callable[[int], None] | None = None,
) -> list[str]:
    """Transcribe clips without timestamps, in the order given.

    Args:
        model: as loaded, or with SAML layers. A Whisper whose experts were trained on short
            windows is given short ones; any other hears each clip padded to 30 s.
        processor: of that model.
        clips: float32 [samples] at 16 kHz, each at most 30 s.
        beam_size: 1 is greedy.
        language: of a multilingual model; None lets it detect.
        batch_size: clips decoded together; divided by the beam size.
        on_done: called with the number of clips done, after each batch.
    """
    family = family_of(model)
    texts = [""] * len(clips)
    order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
    size = max(1, batch_size // beam_size)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), size):
        index = order[start : start + size]
        found = family.hear(model, processor, [clips[i] for i in index], beam_size, language)
        for i, text in zip(index, found, strict=True):
            texts[i] = text
        if on_done:
            on_done(len(index))
    model.train(was_training)
    return texts
