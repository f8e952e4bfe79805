"""Speech of any length -> text with times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from saml_kernels.errors import SAMLError
from saml_models.audio import SAMPLE_RATE, check_audio, load_audio
from saml_models.decoding import decode_clips
from saml_models.families import family_of
from saml_models.quiet import quiet_transformers
from saml_models.segments import Segment, Transcript, Word
from saml_models.speakers import SpeakerProfile

__all__ = ["Segment", "Transcript", "Word", "transcribe", "transcribe_many"]

Audio = str | os.PathLike[str] | npt.NDArray[np.floating]

WINDOW_SAMPLES = 30 * SAMPLE_RATE  # what is decoded at once
GATHERED = 2  # batches that wait for each other, to be sorted by length


def transcribe(
    model: Any,
    processor: Any,
    audio: Audio,
    speaker: SpeakerProfile | str | os.PathLike[str] | None = None,
    *,
    language: str | None = None,
    task: str = "transcribe",
    beam_size: int = 1,
    word_timestamps: bool = False,
    timestamps: bool = True,
    on_progress: Callable[[float, float], None] | None = None,
) -> Transcript:
    """Transcribe one recording.

    Args:
        model: as loaded, or with SAML layers.
        processor: of that model.
        audio: a file, or floating-point samples [samples] at 16 kHz.
        speaker: a profile, or its file, for a model with SAML layers; applied for this call.
        language: code ("de") or name ("german"); None detects it, where the model knows several.
        task: "transcribe", or "translate" into English with a multilingual model.
        beam_size: 1 is greedy.
        word_timestamps: also find when each word was said, by the decoder's attention.
        timestamps: False leaves the times out where a clip fits one window of 30 s; experts are
            trained so, and hear best so.
        on_progress: called with (seconds done, seconds in all).

    Raises:
        SAMLError: audio that cannot be read, a language or task that the model does not know, or
            a profile of another model.
    """
    found = transcribe_many(
        model,
        processor,
        [audio],
        speaker,
        language=language,
        task=task,
        beam_size=beam_size,
        word_timestamps=word_timestamps,
        timestamps=timestamps,
        on_progress=on_progress and (lambda _, done, seconds: on_progress(done, seconds)),
    )
    return next(found)


def transcribe_many(
    model: Any,
    processor: Any,
    recordings: Iterable[Audio],
    speaker: SpeakerProfile | str | os.PathLike[str] | None = None,
    *,
    language: str | None = None,
    task: str = "transcribe",
    beam_size: int = 1,
    word_timestamps: bool = False,
    timestamps: bool = True,
    batch_size: int = 8,
    on_progress: Callable[[int, float, float], None] | None = None,
) -> Iterator[Transcript]:
    """Transcribe recordings, in their order.

    Those of up to 30 s are decoded together where no times are asked for.

    Args:
        model, processor, speaker: as in `transcribe`, and so is all that is not named here.
        recordings: files or samples, read as they are needed.
        batch_size: clips decoded together.
        on_progress: called with (number of the recording, seconds done, seconds of it).

    Raises:
        SAMLError: as `transcribe`.
    """
    if beam_size < 1:
        raise SAMLError(f"beam_size: {beam_size}; expected 1 or more")
    family = family_of(model)
    known = family.language_code(model, language, task)
    profile = speaker
    if profile is not None and not isinstance(profile, SpeakerProfile):
        profile = SpeakerProfile.load(profile)
    speaker_hash = profile.hash if profile else None
    plain = not timestamps and not word_timestamps and task == "transcribe"
    waiting: list[tuple[int, npt.NDArray[np.float32], str]] = []

    def show(number: int, done: float, seconds: float) -> None:
        if on_progress:
            on_progress(number, done, seconds)

    def heard() -> Iterator[Transcript]:
        """What waits, decoded together: one language at a time."""
        clips, code = [clip for _, clip, _ in waiting], waiting[0][2]
        texts = decode_clips(
            model, processor, clips, beam_size=beam_size, language=code, batch_size=batch_size
        )
        for (number, clip, _), text in zip(waiting, texts, strict=True):
            seconds = len(clip) / SAMPLE_RATE
            show(number, seconds, seconds)
            segments = [Segment(0, 0.0, seconds, text)] if text else []
            yield Transcript(text, code, round(seconds, 3), segments, speaker_hash)
        waiting.clear()

    was_training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        stack.enter_context(quiet_transformers())
        if profile is not None:
            stack.enter_context(profile.applied(model))
        model.eval()
        for number, recording in enumerate(recordings):
            clip = _samples(recording)
            code = known or family.detect_language(model, processor, clip)
            short = plain and len(clip) <= WINDOW_SAMPLES
            if waiting and (
                not short or waiting[0][2] != code or len(waiting) >= GATHERED * batch_size
            ):
                yield from heard()
            if short:
                waiting.append((number, clip, code))
                continue
            seconds = len(clip) / SAMPLE_RATE
            text, segments = family.segments(
                model,
                processor,
                clip,
                code,
                task=task,
                beam_size=beam_size,
                words=word_timestamps,
                on_progress=partial(show, number),
            )
            show(number, seconds, seconds)
            yield Transcript(text, code, round(seconds, 3), segments, speaker_hash)
        if waiting:
            yield from heard()


def _samples(recording: Audio) -> npt.NDArray[np.float32]:
    """float32 at 16 kHz."""
    if isinstance(recording, np.ndarray):
        check_audio(recording, "audio")
        return recording.astype(np.float32, copy=False)
    return load_audio(recording)
