"""Clips of up to 30 s -> text, in batches of like length.

A clip's text does not depend on its batch: each has its own window and its own limit of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch

from saml_models.data.silence import has_speech
from saml_models.models.interface import SpeechModel
from saml_models.models.own_words import OwnWords
from saml_models.runtime.threads import look, shared_cores
from saml_models.speakers.mixing import Speaker, hears_short_windows, mixed_batch

__all__ = ["decode_clips"]


@torch.inference_mode()
def decode_clips(
    speech: SpeechModel,
    clips: Sequence[np.ndarray],
    *,
    beam_size: int = 1,
    language: str | None = None,
    batch_size: int = 24,
    speakers: Sequence[Speaker] | None = None,
    own_words: OwnWords | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[str]:
    """Transcribe clips without timestamps, in the order given; "" where there is no speech.

    Args:
        speech: as loaded, or with SAML layers. A Whisper whose experts were trained on short
            windows is given short ones; any other hears each clip padded to 30 s.
        clips: float32 [samples] at 16 kHz, each at most 30 s.
        beam_size: 1 is greedy.
        language: of a multilingual model; None lets it detect.
        batch_size: clips decoded together; divided by the beam size.
        speakers: a profile, or None, for each clip; they share batches where the model can.
        own_words: as `SpeechModel.own_words` makes them, that are likelier than the model thinks.
        on_done: called with the number of clips done, after each batch.

    Raises:
        SAMLError: a profile of another model.
    """
    texts = [""] * len(clips)
    speakers = speakers or [None] * len(clips)
    network = speech.network
    with speech.evaluating(), shared_cores(network):
        for index in _batches(network, clips, speakers, max(1, batch_size // beam_size)):
            look()
            spoken = [i for i in index if has_speech(clips[i], partial(speech.no_speech, clips[i]))]
            if spoken:
                with mixed_batch(network, [speakers[i] for i in spoken]):
                    heard = [clips[i] for i in spoken]
                    decoded = speech.decode(heard, beam_size, language, own_words)
                for i, text in zip(spoken, decoded, strict=True):
                    texts[i] = text
            if on_done:
                on_done(len(index))
    return texts


def _batches(
    network: Any, clips: Sequence[np.ndarray], speakers: Sequence[Speaker], size: int
) -> Iterator[list[int]]:
    """Clips of like length, and of one kind of window; of one speaker where that must be."""
    saml = getattr(network, "saml", None)
    mixed = saml is not None and saml.can_mix
    apart = hears_short_windows if mixed else lambda _, speaker: id(speaker)
    kinds = [apart(network, speaker) for speaker in speakers]
    order = sorted(range(len(clips)), key=lambda i: (kinds[i], len(clips[i])))
    for _, group in groupby(order, key=lambda i: kinds[i]):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))
