"""Transcripts as OpenAI's audio interface gives them."""

from __future__ import annotations

import json
import math
from typing import Any

from transformers.models.whisper.tokenization_whisper import LANGUAGES

from saml_kernels.errors import SAMLError
from saml_models.server.errors import error_body, kind_of, refusal
from saml_models.text.transcript import Segment, Transcript
from saml_models.text.writers import render

__all__ = ["FORMATS", "MEDIA_TYPES", "answer", "delta", "done", "failed"]

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}


def answer(
    transcript: Transcript, format: str, words: bool, segments: bool
) -> str | dict[str, Any]:
    """A body: text for "text", "srt" and "vtt", else what becomes JSON.

    Args:
        transcript: with times, for "srt", "vtt" and "verbose_json".
        format: one of `FORMATS`.
        words, segments: what "verbose_json" has times of.
    """
    if format == "text":
        return transcript.text + "\n"
    if format in ("srt", "vtt"):
        return render(transcript, format)
    found: dict[str, Any] = {"text": transcript.text, "usage": _usage(transcript)}
    if transcript.speaker_hash is not None:
        found["speaker_hash"] = transcript.speaker_hash
    if format == "json":
        return found
    found |= {
        "task": "transcribe",
        "language": LANGUAGES.get(transcript.language, transcript.language),
        "duration": transcript.duration,
    }
    if segments:
        found["segments"] = [_without_words(s) for s in transcript.segments]
    if words:
        found["words"] = [
            {"word": w.word.strip(), "start": w.start, "end": w.end}
            for s in transcript.segments
            for w in s.words or []
        ]
    return found


def _without_words(segment: Segment) -> dict[str, Any]:
    """A segment; words are a list of their own."""
    return {key: value for key, value in segment.to_dict().items() if key != "words"}


def delta(text: str) -> str:
    """A server-sent event with what was heard since the last."""
    return _event({"type": "transcript.text.delta", "delta": text})


def done(transcript: Transcript) -> str:
    """The last server-sent event."""
    body = {"type": "transcript.text.done", "text": transcript.text}
    return _event(body | {"usage": _usage(transcript)}) + "data: [DONE]\n\n"


def failed(error: SAMLError) -> str:
    """The last server-sent event where there is no text."""
    kind = kind_of(refusal(error).status_code)
    return _event({"type": "error", **error_body(str(error), kind)})


def _usage(transcript: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(transcript.duration)}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
