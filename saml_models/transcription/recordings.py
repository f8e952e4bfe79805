"""Speech of any length -> text with times."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from saml_kernels.errors import SAMLError
from saml_models.data.audio import Audio, load_audio, samples_of
from saml_models.models.interface import DecodingOptions
from saml_models.models.registry import bind
from saml_models.runtime.prefetch import ahead
from saml_models.runtime.quiet import quiet_transformers
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.phrases import Phrases, phrases_of
from saml_models.text.transcript import Segment, Transcript, Word
from saml_models.transcription.together import Passage, Together

__all__ = ["Segment", "Transcript", "Word", "transcribe", "transcribe_many"]

Speaker = SpeakerProfile | str | os.PathLike[str] | None

GATHERED = 2  # batches that wait for each other, to be sorted by length
HELD = 7200.0  # seconds of audio in memory at once, unless one recording has more: 0.5 GB
TOGETHER = 32  # clips of a list in one batch at most


def transcribe(
    model: Any,
    processor: Any,
    audio: Audio | Sequence[Audio],
    speaker: Speaker | Sequence[Speaker] = None,
    *,
    language: str | None = None,
    task: str = "transcribe",
    beam_size: int = 1,
    word_timestamps: bool = False,
    timestamps: bool | None = None,
    own_words: Phrases | None = None,
    on_progress: Callable[[float, float], None] | None = None,
) -> Any:
    """Transcribe one recording, or a list of them together, each with the words it has alone.

    Args:
        model: as loaded, or with SAML layers.
        processor: of that model.
        audio: a file, or floating-point samples [samples] at 16 kHz (array or tensor); or a list of
            such.
        speaker: a profile, or its file, for a model with SAML layers; used for this call. For a
            list of recordings also a list, with a profile or None for each: one batch has as many
            speakers as it has rows.
        language: code ("de") or name ("german"); None detects it, where the model knows several.
        task: "transcribe", or "translate" into English with a multilingual model.
        beam_size: 1 is greedy.
        word_timestamps: also find when each word was said, by the decoder's attention.
        timestamps: False leaves the times out where a clip fits one window of 30 s; experts are
            trained so, and hear best so. None asks for times of a single recording, not of a list.
        own_words: names and terms that are likelier than the model thinks: a file with one a line,
            or a list of them; see `text.phrases`.
        on_progress: called with (seconds done, seconds in all), of a list with recordings.

    Returns:
        A `Transcript`, or for a list of recordings a list of them, in order.

    Raises:
        SAMLError: audio that cannot be read, a language or task that the model does not know, a
            profile of another model, or not as many speakers as recordings.

    Example:
        >>> model, processor = load_whisper("tiny.en")
        >>> transcribe(model, processor, np.zeros(16000, np.float32)).text
        ''
    """
    many = isinstance(audio, list | tuple)
    recordings: Sequence[Any] = audio if many else [audio]  # type: ignore[assignment]

    def show(number: int, done: float, seconds: float) -> None:
        if on_progress is not None and many:
            on_progress(number + done / max(seconds, 1e-9), len(recordings))
        elif on_progress is not None:
            on_progress(done, seconds)

    found = transcribe_many(
        model,
        processor,
        recordings,
        speaker,
        language=language,
        task=task,
        beam_size=beam_size,
        word_timestamps=word_timestamps,
        timestamps=not many if timestamps is None else timestamps,
        own_words=own_words,
        batch_size=min(TOGETHER, max(1, len(recordings)) * beam_size),
        on_progress=show,
    )
    return list(found) if many else next(found)


def transcribe_many(
    model: Any,
    processor: Any,
    recordings: Iterable[Audio],
    speaker: Speaker | Sequence[Speaker] = None,
    *,
    language: str | None = None,
    task: str = "transcribe",
    beam_size: int = 1,
    word_timestamps: bool = False,
    timestamps: bool = True,
    own_words: Phrases | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int, float, float], None] | None = None,
) -> Iterator[Transcript]:
    """Transcribe recordings, in their order.

    They are decoded together, clips and windows of long recordings, with times and without.

    Args:
        model, processor, speaker: as in `transcribe`, and so is all that is not named here.
        recordings: files or samples, read as they are needed.
        batch_size: clips and windows decoded together.
        on_progress: called with (number of the recording, seconds done, seconds of it).

    Raises:
        SAMLError: as `transcribe`.
    """
    if beam_size < 1:
        raise SAMLError(f"beam_size: {beam_size}; expected 1 or more")
    speech = bind(model, processor)
    options = DecodingOptions(
        language=speech.language_code(language, task),
        task=task,
        beam_size=beam_size,
        timestamps=timestamps,
        words=word_timestamps,
        own_words=None if own_words is None else speech.own_words(phrases_of(own_words)),
    )
    together = Together(speech, batch_size)

    def show(number: int, done: float, seconds: float) -> None:
        if on_progress:
            on_progress(number, done, seconds)

    with speech.evaluating(), quiet_transformers():
        pairs = ahead(
            lambda pair: (_samples(pair[0]), pair[1]), _with_speakers(recordings, speaker)
        )
        waiting: deque[Passage] = deque()  # in their order, begun or finished
        for number, (clip, profile) in enumerate(pairs):
            waiting.append(together.add(clip, profile, options, partial(show, number)))
            while len(waiting) >= GATHERED * batch_size or _held(waiting) > HELD:
                if not waiting[0].is_done:
                    together.step()
                else:
                    yield waiting.popleft().result()
        while waiting:
            while not waiting[0].is_done:
                together.step()
            yield waiting.popleft().result()


def _held(waiting: Iterable[Passage]) -> float:
    """Seconds of audio that are still to be heard."""
    return sum(passage.seconds for passage in waiting if not passage.is_done)


def _with_speakers(
    recordings: Iterable[Audio], speaker: Speaker | Sequence[Speaker]
) -> Iterator[tuple[Audio, SpeakerProfile | None]]:
    """Each recording and who is heard in it; a profile's file is read once."""
    files: dict[str, SpeakerProfile] = {}

    def profile(one: Any) -> SpeakerProfile | None:
        if one is None or isinstance(one, SpeakerProfile):
            return one
        name = os.fspath(one)
        if name not in files:
            files[name] = SpeakerProfile.load(name)
        return files[name]

    if not isinstance(speaker, list | tuple):
        yield from zip(recordings, repeat(profile(speaker)))
        return
    listed = list(recordings)
    if len(listed) != len(speaker):
        raise SAMLError(f"speaker: {len(speaker)} for {len(listed)} recordings; give one for each")
    yield from zip(listed, [profile(one) for one in speaker], strict=True)


def _samples(recording: Audio) -> npt.NDArray[np.float32]:
    """float32 at 16 kHz."""
    given = samples_of(recording)
    return load_audio(given) if isinstance(given, Path) else given
