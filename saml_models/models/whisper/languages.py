"""The languages that a Whisper knows, and which of them a clip is in."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from transformers import (
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from saml_kernels.errors import SAMLError
from saml_models.data.audio import MAX_SAMPLES
from saml_models.models.interface import context_of
from saml_models.models.whisper.windows import (
    FULL_WINDOW,
    audio_mask,
    audio_window,
    clip_window,
    log_mel,
)

__all__ = ["detect_language", "is_multilingual", "language_code", "no_speech_probability"]


def is_multilingual(model: WhisperForConditionalGeneration) -> bool:
    """Whether the model has to be told a language."""
    return bool(getattr(model.generation_config, "is_multilingual", False))


def _languages(model: WhisperForConditionalGeneration) -> dict[str, int]:
    """Codes of the languages a multilingual model knows, and their tokens."""
    tokens: dict[str, int] = getattr(model.generation_config, "lang_to_id", {})
    return {name.strip("<|>"): number for name, number in tokens.items()}


def language_code(
    model: WhisperForConditionalGeneration, language: str | None, task: str
) -> str | None:
    """The code of a language that `model` knows; None has to be detected."""
    if task not in ("transcribe", "translate"):
        raise SAMLError(f"task: {task!r}; expected 'transcribe' or 'translate'")
    code = None
    if language is not None:
        name = language.strip().lower()
        code = name if name in LANGUAGES else TO_LANGUAGE_CODE.get(name)
        if code is None:
            raise SAMLError(f"language: {language!r} is unknown; expected a code such as en or de")
    if is_multilingual(model):
        if code is not None and code not in _languages(model):
            raise SAMLError(f"language: this model does not know {code!r}; use a larger Whisper")
        return code
    if code not in (None, "en") or task == "translate":
        asked = "translation" if task == "translate" else f"{LANGUAGES[str(code)]} ({code})"
        raise SAMLError(f"language: {asked} asked of an English-only model; use a multilingual one")
    return "en"


@torch.inference_mode()
def detect_language(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, clip: npt.NDArray[Any]
) -> str:
    """The code of the language that a clip (float32 [samples], 16 kHz) begins in."""
    features = log_mel(processor, [clip[:MAX_SAMPLES]], FULL_WINDOW)
    token = int(model.detect_language(features.to(model.device, model.dtype))[0])
    return {number: code for code, number in _languages(model).items()}[token]


@torch.inference_mode()
def no_speech_probability(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, clip: npt.NDArray[Any]
) -> float:
    """Of a clip of up to 30 s (float32 [samples], 16 kHz), heard in its own window."""
    frames = clip_window(model, len(clip))
    features = log_mel(processor, [clip], frames).to(model.device, model.dtype)
    generation: Any = model.generation_config
    start = torch.tensor([[generation.decoder_start_token_id]], device=model.device)
    mask = audio_mask([len(clip)], frames, model.device)
    with context_of(model).batch(mask), audio_window(model, frames):
        logits = model(features, decoder_input_ids=start, use_cache=False).logits[0, 0]
    # <|nospeech|>, in older vocabularies <|nocaptions|>, lies before <|notimestamps|>.
    return float(logits.float().softmax(-1)[generation.no_timestamps_token_id - 1])
