"""Windows with times, of many recordings and speakers, decoded together.

What openai-whisper does with a window (Radford et al., arXiv 2212.04356, section 4.5): timestamp
tokens by its rules, the text before as a prompt, higher temperatures where the text is a loop or
improbable, and nothing where there is no speech. A row's text does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperProcessor
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor
from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter

from saml_models.data.audio import SAMPLE_RATE
from saml_models.data.silence import has_speech
from saml_models.models.interface import Clip, context_of
from saml_models.models.loops import TEMPERATURES, draws, is_loop, once, repeated
from saml_models.models.own_words import OwnWords
from saml_models.models.token_limits import token_limit
from saml_models.models.whisper.decoder import Decoder, Window, encode
from saml_models.models.whisper.greedy import Step, can_decode
from saml_models.models.whisper.languages import no_speech_probability
from saml_models.models.whisper.windows import FULL_WINDOW, audio_mask, clip_window, log_mel
from saml_models.runtime.prefetch import ahead
from saml_models.runtime.threads import look

__all__ = ["HeardWindow", "TimedWindow", "can_time", "hear_windows", "heard_at_once"]

# openai-whisper's: below the first a text is tried again, unless there is no speech.
LOG_PROB, NO_SPEECH = -1.0, 0.6
MAX_NEW_TOKENS = 224  # half of the decoder's positions, as openai-whisper has it
TOKEN_SECONDS = 0.02  # from one timestamp token, and one encoder frame, to the next
TOGETHER = 9000  # mel frames in a batch, padding included: memory goes by them


@dataclass(frozen=True)
class TimedWindow:
    """One window of a recording.

    Attributes:
        clip: float32 [samples] at 16 kHz, up to 30 s.
        whole: samples of the recording, if it fits one window, whose length goes by it; else None.
        prompt: token ids from <|startofprev|> or <|startoftranscript|> on.
        temperature: 0 takes the likeliest tokens, and is raised where that fails.
        words: whether to find when each token was said.
        own_words: that are likelier than the model thinks.
    """

    clip: Clip
    whole: int | None
    prompt: Sequence[int]
    temperature: float = 0.0
    words: bool = False
    own_words: OwnWords | None = None


@dataclass(frozen=True)
class HeardWindow:
    """What was heard in a window.

    Attributes:
        ids: text and timestamp tokens; none where there is no speech.
        log_prob: mean over them and the end.
        temperature: at which they were drawn.
        no_speech: probability that there is no speech, by what follows <|startoftranscript|>.
        times: seconds in the window at which each token ends, if they were asked for.
    """

    ids: list[int]
    log_prob: float = 0.0
    temperature: float = 0.0
    no_speech: float = 0.0
    times: list[float] | None = None


def can_time(model: Any) -> bool:
    """Whether `hear_windows` can stand in for transformers' `generate`."""
    return can_decode(model) and hasattr(model.generation_config, "no_timestamps_token_id")


@torch.inference_mode()
def hear_windows(
    model: Any, processor: WhisperProcessor, windows: Sequence[TimedWindow]
) -> list[HeardWindow]:
    """Decode windows together, each with the speaker whom the model's context has for it.

    Args:
        model: Whisper in evaluation mode, for which `can_time` holds.
        processor: of that model.
        windows: in the order of the context's speakers, all with the same own words.
    """
    context = context_of(model)
    heard = [HeardWindow([])] * len(windows)
    spoken = []
    for i, window in enumerate(windows):
        with context.narrowed(slice(i, i + 1)):
            ask = partial(no_speech_probability, model, processor, window.clip)
            if has_speech(window.clip, ask):
                spoken.append(i)
    frames = _frames(model, windows)
    order = sorted(spoken, key=lambda i: frames[i])
    for part in _parts([frames[i] for i in order]):
        rows = order[part]
        with context.narrowed(slice(None)):
            if context.speakers is not None:
                context.speakers = context.speakers[rows]
            batch = _Batch(model, processor, [windows[i] for i in rows], [frames[i] for i in rows])
            for i, found in zip(rows, batch.heard(), strict=True):
                heard[i] = found
    return heard


def heard_at_once(model: Any, windows: Sequence[TimedWindow]) -> int:
    """How many windows, from the first on, `hear_windows` decodes in one pass; at least one."""
    longest = 0
    for count, frames in enumerate(_frames(model, windows)):
        longest = max(longest, frames)
        if count and longest * (count + 1) > TOGETHER:
            return count
    return len(windows)


def _frames(model: Any, windows: Sequence[TimedWindow]) -> list[int]:
    """Mel frames of each."""
    wholes = [window.whole for window in windows]
    return [FULL_WINDOW if whole is None else clip_window(model, whole) for whole in wholes]


def _parts(frames: Sequence[int]) -> Iterator[slice]:
    """Of windows sorted by length, so many as make `TOGETHER` frames; or one."""
    start = 0
    for end in range(1, len(frames) + 1):
        if end == len(frames) or frames[end] * (end + 1 - start) > TOGETHER:
            yield slice(start, end)
            start = end


class _Batch:
    """Windows whose encoder output is at hand together."""

    def __init__(
        self,
        model: Any,
        processor: WhisperProcessor,
        windows: Sequence[TimedWindow],
        frames: Sequence[int],
    ) -> None:
        self.model, self.processor, self.windows = model, processor, windows
        generation = model.generation_config
        self.end: int = generation.eos_token_id
        self.limits = [token_limit(len(w.clip)) for w in windows]
        most = model.config.max_target_positions
        self.room = [min(MAX_NEW_TOKENS, most - len(w.prompt)) for w in windows]
        longest = max(len(w.prompt) for w in windows)
        device = model.device
        prompt = torch.full((len(windows), longest), generation.pad_token_id, device=device)
        padding = torch.zeros(len(windows), dtype=torch.int64, device=device)
        for row, window in enumerate(windows):
            padding[row] = longest - len(window.prompt)
            prompt[row, padding[row] :] = torch.tensor(window.prompt, device=device)
        cross = encode(model, ahead(self._features, list(zip(windows, frames, strict=True))))
        decoder = Decoder(
            model, cross, longest + max(self.room), padding if int(padding.max()) else None
        )
        self.step = _TimedStep(generation, decoder, prompt, windows[0].own_words)

    def _features(self, given: tuple[TimedWindow, int]) -> Window:
        (window, frames) = given
        features = log_mel(self.processor, [window.clip], frames)
        return features, audio_mask([len(window.clip)], frames)

    def heard(self) -> list[HeardWindow]:
        """The windows' texts; those that went wrong are decoded again, one after the other."""
        temperatures = [w.temperature for w in self.windows]
        first = [
            draws([len(w.clip), round(1000 * w.temperature)], 1, MAX_NEW_TOKENS)
            for w in self.windows
        ]
        kept: dict[int, _TimedStep] = {}

        def is_wanted(row: int, found: HeardWindow) -> bool:
            return self._failed(row, found) or self.windows[row].words

        self.step.draw(temperatures, torch.cat(first))
        texts = self._say(self.step, list(range(len(self.windows))), is_wanted, kept)
        for row, found in enumerate(texts):
            if self._failed(row, found):
                found = self._again(row, found, kept[row])
            if self.windows[row].words and found.ids:
                found = replace(found, times=self._times(row, found.ids, kept[row]))
            texts[row] = found
        return texts

    def _failed(self, row: int, found: HeardWindow) -> bool:
        """Whether a text of the temperature that was asked for is not good enough."""
        return self.windows[row].temperature == 0 and not self._is_good(row, found)

    def _is_good(self, row: int, found: HeardWindow) -> bool:
        return found.log_prob >= LOG_PROB and not self._looped(row, found)

    def _looped(self, row: int, found: HeardWindow) -> bool:
        return is_loop([t for t in found.ids if t < self.end], self.limits[row])

    def _again(self, row: int, first: HeardWindow, alone: _TimedStep) -> HeardWindow:
        """The first good text at rising temperatures, or the best of all that were tried."""
        clip = self.windows[row].clip
        if first.log_prob < LOG_PROB:
            alone.decoder.take_turn()
            # Heard by itself: the context holds this row alone, until the batch takes turns again.
            if no_speech_probability(self.model, self.processor, clip) > NO_SPEECH:
                return HeardWindow([])
        again = alone.alone(0, len(TEMPERATURES))
        again.decoder.take_turn()
        uniform = draws(first.ids, len(TEMPERATURES), MAX_NEW_TOKENS)
        again.draw(TEMPERATURES, uniform)
        tried = [first, *self._say(again, [row] * len(TEMPERATURES))]
        for found in tried:
            if self._is_good(row, found):
                return found
        best = max(tried, key=lambda found: (not self._looped(row, found), found.log_prob))
        if self._looped(row, best):
            text = [i for i, t in enumerate(first.ids) if t < self.end]
            left = len(once([first.ids[i] for i in text]))
            return replace(first, ids=first.ids[: text[left - 1] + 1] if left else first.ids)
        return best

    def _say(
        self,
        step: _TimedStep,
        windows: Sequence[int],
        is_wanted: Any = None,
        kept: dict[int, _TimedStep] | None = None,
    ) -> list[HeardWindow]:
        """Each row's text up to its end, its window's limits or a loop.

        Args:
            step: with a row for each of `windows`.
            windows: which window each row is.
            is_wanted: says of a window's text whether its row is asked for again.
            kept: where such rows go, before the batch drops them.
        """
        rows = list(range(len(windows)))
        ids: list[list[int]] = [[] for _ in rows]
        texts: list[list[int]] = [[] for _ in rows]  # without timestamps
        worth = [0.0] * len(rows)
        found: dict[int, HeardWindow] = {}
        said = 0
        while len(found) < len(windows):
            look()
            step(step.first + said)
            new = step.said(step.first + said, 1)
            said += 1
            for place, (row, (token,)) in enumerate(zip(rows, new, strict=True)):
                if row in found:
                    continue
                window = windows[row]
                worth[row] += step.worth[place]
                ended = token in step.ends
                if not ended:
                    ids[row].append(token)
                    if token < self.end:
                        texts[row].append(token)
                    ended = (
                        len(ids[row]) >= self.room[window]
                        or len(texts[row]) >= self.limits[window]
                        or (token < self.end and repeated(texts[row]) > 0)
                    )
                if ended:
                    mean = worth[row] / said
                    heat = step.temperature_of(place)
                    found[row] = HeardWindow(ids[row], mean, heat, step.no_speech[row])
                    if kept is not None and is_wanted(window, found[row]):
                        kept[window] = step.alone(place, 1)
            going = [place for place, row in enumerate(rows) if row not in found]
            # Rows of one clip share its vector and its speaker, which cannot be divided.
            if kept is not None and going and 2 * len(going) <= len(rows):
                rows = [rows[place] for place in going]
                step.keep(torch.tensor(going, device=step.text.device))
        return [found[row] for row in range(len(windows))]

    def _times(self, row: int, ids: list[int], alone: _TimedStep) -> list[float]:
        """Seconds at which each token ends, by dynamic time warping of the decoder's attention."""
        alone.decoder.take_turn()
        given = torch.tensor([ids], device=alone.text.device)
        tokens = torch.cat((alone.text[:1, : alone.first], given), dim=1)
        heads = self.model.generation_config.alignment_heads
        looked = alone.decoder.attention(tokens, heads)[0, :, alone.first :]
        frames = max(1, int(len(self.windows[row].clip) / SAMPLE_RATE / TOKEN_SECONDS))
        looked = looked[..., :frames]
        spread = looked.std(-2, keepdim=True, unbiased=False).clamp(min=1e-9)
        sharp = (looked - looked.mean(-2, keepdim=True)) / spread
        smooth = _median_filter(sharp[None], self.model.config.median_filter_width)[0]
        of_token, of_frame = _dynamic_time_warping(-smooth.mean(0).double().cpu().numpy())
        begins = np.pad(np.diff(of_token), (1, 0), constant_values=1).astype(bool)
        return [float(t) for t in of_frame[begins] * TOKEN_SECONDS]


class _TimedStep(Step):
    """A step that keeps to the rules of timestamps, at a temperature of each row's own.

    Attributes:
        worth: the log-probability of each row's newest token.
        no_speech: of each row of the batch as it began, as `HeardWindow.no_speech`.
    """

    def __init__(
        self, generation: Any, decoder: Decoder, prompt: Tensor, own_words: OwnWords | None
    ) -> None:
        super().__init__(generation, decoder, prompt, own_words)
        self.can_replay = False  # the rules are Python, and ask for the tokens
        self.rules = WhisperTimeStampLogitsProcessor(generation, self.first)
        self.worth: list[float] = []
        self.no_speech: list[float] = []
        # <|nospeech|>, in older vocabularies <|nocaptions|>, lies before <|notimestamps|>.
        self._silence: int = generation.no_timestamps_token_id - 1
        self._start: int = generation.decoder_start_token_id
        self.temperatures = self.uniform = torch.zeros(0)

    def draw(self, temperatures: Sequence[float], uniform: Tensor) -> None:
        """From now on rows draw by `uniform` [B, n], float64; those at 0 take the likeliest."""
        device = self.text.device
        self.temperatures = torch.tensor(temperatures, dtype=torch.float64, device=device)[:, None]
        self.uniform = uniform.to(device)

    def temperature_of(self, row: int) -> float:
        """At which a row draws."""
        return float(self.temperatures[row])

    def begin(self, end: int) -> Tensor:
        """Logits [B, V] after the prompt of `end` tokens; notes how likely silence is."""
        (places,) = (self.text[0, :end] == self._start).nonzero(as_tuple=True)
        start = int(places[-1])  # padding and the text before lie in front
        logits, first = self.decoder.begin(self.text[:, :end], self.places[:end], end, start)
        self.no_speech = first.float().softmax(-1)[:, self._silence].tolist()
        return logits

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, [B, 1], from logits [B, V]."""
        at = int(self.place)
        logits = self.rules(self.text[:, :at], logits.float())
        likely = self.likely(logits)
        tokens = likely.argmax(-1, keepdim=True)
        if bool((self.temperatures > 0).any()):
            heat = torch.where(self.temperatures > 0, self.temperatures, 1.0)
            below = (likely.double() / heat).softmax(-1).cumsum(-1)
            drawn = self.uniform[:, at - self.first, None] * below[:, -1:]
            drawn = torch.searchsorted(below, drawn, right=True).clamp_(max=logits.shape[1] - 1)
            tokens = torch.where(self.temperatures > 0, drawn, tokens)
        self.worth = logits.log_softmax(-1).gather(1, tokens)[:, 0].tolist()
        return self.spell(tokens)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        super().keep(rows)
        self.temperatures, self.uniform = self.temperatures[rows], self.uniform[rows]
