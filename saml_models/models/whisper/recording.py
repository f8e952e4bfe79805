"""A recording with times, window by window: what the next window begins with, and where."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import WhisperProcessor

from saml_models.data.audio import MAX_SAMPLES, SAMPLE_RATE
from saml_models.models.interface import Clip, DecodingOptions, Piece, Pieces
from saml_models.models.whisper.languages import is_multilingual
from saml_models.models.whisper.longform import read_segments
from saml_models.models.whisper.timed import TOKEN_SECONDS, HeardWindow, TimedWindow
from saml_models.models.whisper.windows import FRAMES_PER_SECOND
from saml_models.text.transcript import Decoding

__all__ = ["split_window", "windows_of"]

UNCERTAIN = 0.5  # text of a higher temperature is no prompt for what follows; openai-whisper's
_STEP = round(TOKEN_SECONDS * SAMPLE_RATE)  # samples of one timestamp token


def windows_of(
    model: Any,
    processor: WhisperProcessor,
    clip: Clip,
    language: str,
    options: DecodingOptions,
    on_progress: Callable[[float, float], None],
    on_text: Callable[[str], None],
) -> Pieces:
    """As `SpeechModel.pieces`: each window begins where the one before was sure of its end."""
    generation, tokenizer = model.generation_config, processor.tokenizer
    first_time = generation.no_timestamps_token_id + 1
    start = [generation.decoder_start_token_id]
    if is_multilingual(model):
        start += [generation.lang_to_id[f"<|{language}|>"], generation.task_to_id[options.task]]
    before = tokenizer.convert_tokens_to_ids("<|startofprev|>")
    room = model.config.max_target_positions // 2 - 1  # tokens of the text before
    history: list[int] = []
    if options.prompt.strip():
        encoded = tokenizer(" " + options.prompt.strip(), add_special_tokens=False)
        history = list(encoded.input_ids)
    whole = len(clip) if len(clip) <= MAX_SAMPLES else None
    seconds = len(clip) / SAMPLE_RATE
    parts: list[dict[str, Any]] = []
    said, at, end_of_text = "", 0, tokenizer.eos_token_id
    while at < len(clip):
        window = clip[at : at + MAX_SAMPLES]
        prompt = [*([before, *history[-room:]] if history else []), *start]
        asked = TimedWindow(
            window, whole, prompt, options.temperature, options.words, options.own_words
        )
        heard = yield Piece("window", window, language, asked)
        found, step = split_window(heard, len(window), first_time)
        text = tokenizer.decode([t for t in heard.ids if t < end_of_text]).strip()
        common: dict[str, Any] = {
            "seek": at * FRAMES_PER_SECOND // SAMPLE_RATE,
            "temperature": heard.temperature,
            "avg_logprob": heard.log_prob,
            "compression_ratio": _compression(text),
            "no_speech_prob": heard.no_speech,
        }
        for first, last, begin, end in found:
            part: dict[str, Any] = {
                "tokens": torch.tensor(heard.ids[first:last]),
                "start": at / SAMPLE_RATE + begin,
                "end": at / SAMPLE_RATE + end,
                "decoding": Decoding(tokens=heard.ids[first:last], **common),
            }
            if heard.times is not None:
                part["token_timestamps"] = [at / SAMPLE_RATE + t for t in heard.times[first:last]]
            parts.append(part)
            history += heard.ids[first:last]
            words = tokenizer.decode([t for t in heard.ids[first:last] if t < end_of_text])
            if words.strip() and part["start"] < seconds:
                said += words
        if heard.temperature > max(UNCERTAIN, options.temperature):
            history = []
        at += step
        if found:
            on_text(said.strip())
        on_progress(min(at / SAMPLE_RATE, seconds), seconds)
    return read_segments(parts, tokenizer, seconds, language)


def _compression(text: str) -> float:
    """openai-whisper's measure of repetition: bytes over compressed bytes."""
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


def split_window(
    heard: HeardWindow, samples: int, first_time: int
) -> tuple[list[tuple[int, int, float, float]], int]:
    """The segments of a window, and how many samples of it are done with.

    Two timestamps in a row end a segment and begin the next. One that was not ended is left to the
    next window, unless it is the only one.

    Args:
        heard: its tokens.
        samples: of the window.
        first_time: the token of 0 s.

    Returns:
        Of each segment the indices of its first token and beyond its last, its start and its end in
        seconds; and the samples.
    """
    ids = heard.ids
    if not ids:
        return [], samples
    marks = [token >= first_time for token in ids]
    cuts = [i + 1 for i, pair in enumerate(pairwise(marks)) if pair == (True, True)]
    if not cuts:
        end = samples / SAMPLE_RATE
        times = [token for token in ids if token > first_time]
        if times:
            end = min(end, _seconds(times[-1], first_time))
        begin = _seconds(ids[0], first_time) if marks[0] else 0.0
        return [(0, len(ids), min(begin, end), end)], samples
    done = samples
    if marks[-2:] == [False, True]:
        cuts.append(len(ids))
    else:  # cut off in the middle of a segment: it is heard again from its beginning
        end = (ids[cuts[-1] - 1] - first_time) * _STEP
        done = end if 0 < end < samples else samples
    return [
        (first, last, *_times(ids[first:last], first_time)) for first, last in pairwise([0, *cuts])
    ], done


def _times(ids: Sequence[int], first_time: int) -> tuple[float, float]:
    """The first and the last of a segment's own timestamps."""
    return _seconds(ids[0], first_time), _seconds(ids[-1], first_time)


def _seconds(token: int, first_time: int) -> float:
    return max(0, token - first_time) * TOKEN_SECONDS
