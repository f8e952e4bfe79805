"""Whisper's languages, and recordings of any length with times, by transformers' generation."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    StoppingCriteriaList,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from saml_models.data.audio import MAX_SAMPLES, SAMPLE_RATE
from saml_models.data.silence import has_speech
from saml_models.models.interface import context_of
from saml_models.models.loops import TEMPERATURES, is_loop, once
from saml_models.models.own_words import OwnWords, processors
from saml_models.models.token_limits import OwnLimits, token_limit
from saml_models.models.whisper.languages import is_multilingual, no_speech_probability
from saml_models.models.whisper.windows import (
    FRAMES_PER_SECOND,
    FULL_WINDOW,
    audio_mask,
    audio_window,
    clip_window,
    log_mel,
)
from saml_models.runtime.threads import shared_cores
from saml_models.text.transcript import Segment, Word

__all__ = ["generate_segments", "read_segments"]

# openai-whisper's rules for a window that went wrong: try again at the next temperature.
FALLBACK: dict[str, Any] = {
    "temperature": (0.0, *TEMPERATURES),
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
}

_UNSPACED = {"zh", "ja", "th", "lo", "my", "yue"}  # written without spaces between words


@contextmanager
def _fallback(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clip: npt.NDArray[np.float32],
) -> Iterator[None]:
    """Within the block `generate` skips windows without speech, and tries again what is a loop.

    transformers tries at one temperature after another, and keeps the last where none will do; here
    each is stopped where it runs into a loop, and where none will do the most likely is kept that
    is no loop, or else the first with what it repeats said once.
    """
    at_one: Any = model.generate_with_fallback
    end = model.generation_config.eos_token_id
    limit = token_limit(min(len(clip), MAX_SAMPLES))

    def of_text(tokens: Tensor) -> list[int]:
        return [t for t in tokens.tolist() if t < end]

    def fallback(**given: Any) -> Any:
        first = int(given["seek"][0]) * SAMPLE_RATE // FRAMES_PER_SECOND
        window = clip[first : first + MAX_SAMPLES]
        if not has_speech(window, partial(no_speech_probability, model, processor, window)):
            return [None], [None], [True], given["do_condition_on_prev_tokens"], None
        prompt = given["decoder_input_ids"].shape[-1]
        given["stopping_criteria"] = StoppingCriteriaList([OwnLimits([limit], prompt, end)])
        conditioned = list(given["do_condition_on_prev_tokens"])
        tried = []
        for temperature in given["temperatures"]:
            given["do_condition_on_prev_tokens"] = list(conditioned)
            found = at_one(**given | {"temperatures": [temperature]})
            (tokens,), (output,), (skipped,) = found[:3]
            looped = is_loop(of_text(tokens), limit)
            worth = _log_prob(output["scores"], tokens, temperature or 1.0)
            tried.append((not looped, worth, found))
            if skipped or not (looped or worth < FALLBACK["logprob_threshold"]):
                return found
        sound, _, found = max(tried, key=lambda one: one[:2])
        if not sound:
            _, _, found = tried[0]
            found[0][0] = _said_once(found[0][0], end)
        return found

    model.generate_with_fallback = fallback  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.generate_with_fallback


def _log_prob(scores: Sequence[Tensor], tokens: Tensor, temperature: float) -> float:
    """Mean log-probability of a window's tokens; `scores` are logits over the temperature."""
    likely = (torch.stack(tuple(scores)).float() * temperature).log_softmax(-1)
    own = tokens[: len(likely)].to(likely.device)
    return float(likely[: len(own)].gather(-1, own[:, None]).mean())


def _said_once(tokens: Tensor, end: int) -> Tensor:
    """A loop's tokens, timestamps among them, up to the end of its first copy."""
    text = [i for i, t in enumerate(tokens.tolist()) if t < end]
    left = len(once([int(tokens[i]) for i in text]))
    return tokens[: text[left - 1] + 1] if left else tokens


@torch.inference_mode()
def generate_segments(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clip: npt.NDArray[np.float32],
    language: str,
    task: str,
    beam_size: int,
    words: bool,
    on_progress: Callable[[float, float], None],
    own_words: OwnWords | None = None,
) -> list[dict[str, Any]]:
    """Segments as transformers gives them; a recording beyond 30 s is decoded window by window."""
    mask: Tensor | None = None
    options: dict[str, Any] = FALLBACK | processors(own_words, beam_size)
    if is_multilingual(model):
        options |= {"language": language, "task": task}
    frames = FULL_WINDOW
    if len(clip) > MAX_SAMPLES:
        extracted = processor.feature_extractor(
            clip,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            padding="longest",
            truncation=False,
            return_attention_mask=True,
        )
        features: Tensor = extracted.input_features
        options["attention_mask"] = extracted.attention_mask.to(model.device)
    else:
        frames = clip_window(model, len(clip))
        features = log_mel(processor, [clip], frames)
        mask = audio_mask([len(clip)], frames, model.device)
    seconds = len(clip) / SAMPLE_RATE

    def monitor(position: Tensor) -> None:  # [1, 2]: frames done and in all
        on_progress(min(seconds, float(position[0, 0]) / FRAMES_PER_SECOND), seconds)

    options["monitor_progress"] = monitor
    attention = model.config._attn_implementation
    accelerators = [model.device] if model.device.type == "cuda" else []
    try:
        with (
            context_of(model).batch(mask),
            shared_cores(model),
            audio_window(model, frames),
            _fallback(model, processor, clip),
            torch.random.fork_rng(accelerators),
        ):
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
    return list(result["segments"][0])


def read_segments(
    parts: list[dict[str, Any]], tokenizer: Any, seconds: float, language: str
) -> tuple[str, list[Segment]]:
    """The whole text, and segments within the recording; what was heard in padding is dropped.

    Times never go back. Where words are timed by attention, a segment's own start is another
    clock's and may lie before the last word; and a window's words may be aligned to speech that the
    next window hears again, from where they are cut off.
    """
    segments: list[Segment] = []
    texts = []
    for part, limit in zip(parts, _limits(parts, seconds), strict=True):
        tokens = part["tokens"].tolist()
        # Text tokens come before <|endoftext|> in Whisper's vocabularies, all others after it.
        text = tokenizer.decode([t for t in tokens if t < tokenizer.eos_token_id])
        start, end = (min(round(float(part[key]), 3), seconds) for key in ("start", "end"))
        if not text.strip() or start >= seconds:
            continue
        earliest = segments[-1].end if segments else 0.0
        words = None
        if "token_timestamps" in part:
            times = [min(float(t), limit) for t in part["token_timestamps"]]
            words = _spread(_words(tokens, times, start, earliest, tokenizer, language))
            start, end = words[0].start, words[-1].end
        start = max(start, earliest)
        segments.append(
            Segment(
                len(segments), start, max(start, end), text.strip(), words, part.get("decoding")
            )
        )
        texts.append(text)
    return "".join(texts).strip(), segments


def _limits(parts: list[dict[str, Any]], seconds: float) -> list[float]:
    """When each segment's words end at the latest: where a later window begins to hear."""
    limits, limit = [], seconds
    for part in reversed(parts):
        limits.append(limit)
        if "token_timestamps" in part:
            limit = min([limit, *map(float, part["token_timestamps"][:1])])
    return limits[::-1]


def _words(
    tokens: list[int],
    ends: list[float],
    start: float,
    earliest: float,
    tokenizer: Any,
    language: str,
) -> list[Word]:
    """Group a segment's text tokens into words.

    `ends` says when each token ends; the first word begins at `start`, unless it ends before it,
    and not before `earliest`.
    """
    words: list[Word] = []
    pending: list[int] = []
    begin = max(start, earliest)
    for token, end in zip(tokens, ends, strict=False):
        if token >= tokenizer.eos_token_id:
            continue
        pending.append(token)
        piece = tokenizer.decode(pending)
        if "\ufffd" in piece:  # a character whose bytes are spread over several tokens
            continue
        pending = []
        if not words and end <= start:
            begin = max(earliest, min(ends[0], start))
        end = max(round(end, 3), begin)
        mark = all(unicodedata.category(c)[0] == "P" for c in piece)
        if words and mark:
            words[-1] = Word(words[-1].start, words[-1].end, words[-1].word + piece)
        elif words and not piece.startswith(" ") and language not in _UNSPACED:
            words[-1] = Word(words[-1].start, end, words[-1].word + piece)
        else:
            words.append(Word(begin, end, piece))
        begin = end
    return words or [Word(begin, begin, tokenizer.decode(pending))]


def _spread(words: list[Word]) -> list[Word]:
    """Words that alignment gave no time share that of the word before them, or else after."""
    timed = [i for i, word in enumerate(words) if word.end > word.start]
    if not timed:
        return words
    spread: list[Word] = []
    bounds = [0, *timed[1:], len(words)]
    for i, (first, last) in enumerate(pairwise(bounds)):
        start, end = words[timed[i]].start, words[timed[i]].end
        edges = [
            round(start + (end - start) * k / (last - first), 3) for k in range(last - first + 1)
        ]
        edges[0], edges[-1] = start, end
        spread += [
            Word(a, b, word.word)
            for (a, b), word in zip(pairwise(edges), words[first:last], strict=True)
        ]
    return spread
