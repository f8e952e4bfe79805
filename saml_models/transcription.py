"""Speech of any length -> text with times, through transformers' own Whisper generation."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from saml_kernels.errors import SAMLError
from saml_models.audio import SAMPLE_RATE, check_audio, load_audio
from saml_models.decoding import decode_clips
from saml_models.quiet import quiet_transformers
from saml_models.speakers import SpeakerProfile
from saml_models.window import (
    FRAMES_PER_SECOND,
    FULL_WINDOW,
    audio_mask,
    audio_window,
    log_mel,
    window_frames,
)

__all__ = ["Segment", "Transcript", "Word", "transcribe", "transcribe_many"]

Audio = str | os.PathLike[str] | npt.NDArray[np.floating]

WINDOW_SAMPLES = FULL_WINDOW * SAMPLE_RATE // FRAMES_PER_SECOND
# openai-whisper's rules for a window that went wrong: try again at the next temperature.
FALLBACK: dict[str, Any] = {
    "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "compression_ratio_threshold": 1.35,  # of token ids, as transformers counts; 2.4 of the text
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
}
GATHERED = 2  # batches that wait for each other, to be sorted by length
_UNSPACED = {"zh", "ja", "th", "lo", "my", "yue"}  # written without spaces between words


@dataclass(frozen=True)
class Word:
    """A word, with the space before it, and its times in seconds."""

    start: float
    end: float
    word: str


@dataclass(frozen=True)
class Segment:
    """A stretch of speech, in seconds from the beginning of the recording."""

    id: int
    start: float
    end: float
    text: str
    words: list[Word] | None = None


@dataclass(frozen=True)
class Transcript:
    """What was said. `speaker_hash` is the SHA-256 of the profile that heard it, or None."""

    text: str
    language: str
    duration: float
    segments: list[Segment]
    speaker_hash: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `words` only where there are some."""
        values = asdict(self)
        for segment in values["segments"]:
            if segment["words"] is None:
                del segment["words"]
        return values


def transcribe(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
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
        model: Whisper as loaded, or with SAML layers.
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
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
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
    known = _language_code(model, language, task)
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
            code = known or _detect_language(model, processor, clip)
            short = plain and len(clip) <= WINDOW_SAMPLES
            if waiting and (
                not short or waiting[0][2] != code or len(waiting) >= GATHERED * batch_size
            ):
                yield from heard()
            if short:
                waiting.append((number, clip, code))
                continue
            seconds = len(clip) / SAMPLE_RATE
            found = _generate(
                model,
                processor,
                clip,
                code,
                task,
                beam_size,
                word_timestamps,
                partial(show, number),
            )
            text, segments = _segments(found, processor.tokenizer, seconds, code)
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


def _is_multilingual(model: WhisperForConditionalGeneration) -> bool:
    return bool(getattr(model.generation_config, "is_multilingual", False))


def _languages(model: WhisperForConditionalGeneration) -> dict[str, int]:
    """Codes of the languages a multilingual model knows, and their tokens."""
    tokens: dict[str, int] = getattr(model.generation_config, "lang_to_id", {})
    return {name.strip("<|>"): number for name, number in tokens.items()}


def _language_code(
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
    if _is_multilingual(model):
        if code is not None and code not in _languages(model):
            raise SAMLError(f"language: this model does not know {code!r}; use a larger Whisper")
        return code
    if code not in (None, "en") or task == "translate":
        asked = "translation" if task == "translate" else f"{LANGUAGES[str(code)]} ({code})"
        raise SAMLError(f"language: {asked} asked of an English-only model; use a multilingual one")
    return "en"


@torch.inference_mode()
def _detect_language(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, clip: npt.NDArray[Any]
) -> str:
    features = log_mel(processor, [clip[:WINDOW_SAMPLES]], FULL_WINDOW)
    token = int(model.detect_language(features.to(model.device, model.dtype))[0])
    return {number: code for code, number in _languages(model).items()}[token]


@torch.inference_mode()
def _generate(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clip: npt.NDArray[np.float32],
    language: str,
    task: str,
    beam_size: int,
    words: bool,
    on_progress: Callable[[float, float], None],
) -> list[dict[str, Any]]:
    """Segments as transformers gives them; a recording beyond 30 s is decoded window by window."""
    routing = getattr(model, "saml_routing", None)
    options: dict[str, Any] = dict(FALLBACK)
    if _is_multilingual(model):
        options |= {"language": language, "task": task}
    frames = FULL_WINDOW
    if len(clip) > WINDOW_SAMPLES:
        found = processor.feature_extractor(
            clip,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            padding="longest",
            truncation=False,
            return_attention_mask=True,
        )
        features: Tensor = found.input_features
        options["attention_mask"] = found.attention_mask.to(model.device)
    else:
        if getattr(model, "saml_short_windows", False):
            frames = window_frames(len(clip))
        features = log_mel(processor, [clip], frames)
        if routing is not None:
            routing.mask = audio_mask([len(clip)], frames, model.device)
    seconds = len(clip) / SAMPLE_RATE

    def monitor(position: Tensor) -> None:  # [1, 2]: frames done and in all
        on_progress(min(seconds, float(position[0, 0]) / FRAMES_PER_SECOND), seconds)

    options["monitor_progress"] = monitor
    attention = model.config._attn_implementation
    accelerators = [model.device] if model.device.type == "cuda" else []
    try:
        with audio_window(model, frames), torch.random.fork_rng(accelerators):
            torch.manual_seed(0)  # the fallback samples; the same speech gives the same text
            result = model.generate(
                features.to(model.device, model.dtype),
                num_beams=beam_size,
                return_timestamps=True,
                return_segments=True,
                return_token_timestamps=words or None,
                condition_on_prev_tokens=True,
                **options,
            )
    finally:
        # Word times make transformers switch to eager attention for good.
        model.config._attn_implementation = attention
        if routing is not None:
            routing.mask = None
    return list(result["segments"][0])


def _segments(
    found: list[dict[str, Any]], tokenizer: Any, seconds: float, language: str
) -> tuple[str, list[Segment]]:
    """The whole text, and segments within the recording; what was heard in padding is dropped."""
    segments: list[Segment] = []
    texts = []
    for part in found:
        tokens = part["tokens"].tolist()
        # Text tokens come before <|endoftext|> in Whisper's vocabularies, all others after it.
        text = tokenizer.decode([t for t in tokens if t < tokenizer.eos_token_id])
        start, end = (min(round(float(part[key]), 3), seconds) for key in ("start", "end"))
        if not text.strip() or start >= seconds:
            continue
        words = None
        if "token_timestamps" in part:
            times = [min(float(t), seconds) for t in part["token_timestamps"]]
            words = _words(tokens, times, start, tokenizer, language)
            start, end = words[0].start, words[-1].end
        segments.append(Segment(len(segments), start, max(start, end), text.strip(), words))
        texts.append(text)
    return "".join(texts).strip(), segments


def _words(
    tokens: list[int], ends: list[float], start: float, tokenizer: Any, language: str
) -> list[Word]:
    """Group a segment's text tokens into words; `ends` says when each token ends."""
    words: list[Word] = []
    pending: list[int] = []
    begin = start
    for token, end in zip(tokens, ends, strict=False):
        if token >= tokenizer.eos_token_id:
            continue
        pending.append(token)
        piece = tokenizer.decode(pending)
        if "\ufffd" in piece:  # a character whose bytes are spread over several tokens
            continue
        pending = []
        end = max(round(end, 3), begin)
        mark = all(unicodedata.category(c)[0] == "P" for c in piece)
        if words and mark:
            words[-1] = Word(words[-1].start, words[-1].end, words[-1].word + piece)
        elif words and not piece.startswith(" ") and language not in _UNSPACED:
            words[-1] = Word(words[-1].start, end, words[-1].word + piece)
        else:
            words.append(Word(begin, end, piece))
        begin = end
    return words or [Word(start, start, tokenizer.decode(pending))]
