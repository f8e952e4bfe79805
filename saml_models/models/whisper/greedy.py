"""Greedy decoding of Whisper, token by token, with nothing around the layers themselves.

The same words as transformers' `generate` gives, without its Python per token: caches of fixed
size, logits of the last position alone, and each clip encoded by itself. A step is a function of
tensors that stay where they are: a GPU captures it once as a CUDA graph and replays it; a CPU runs
it and drops clips that have ended from the batch. Models whose routers hook into transformers' own
attention blocks (router="shared") stay with `generate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from saml_kernels.cuda import capture
from saml_models.models.loops import TEMPERATURES, Tried, best_of, draws, is_loop, once, repeated
from saml_models.models.own_words import OwnWords, Spelt
from saml_models.models.whisper.decoder import Decoder, Window, encode
from saml_models.runtime.threads import look

__all__ = ["Step", "can_decode", "greedy"]

REPLAYED = 8  # steps of a CUDA graph before their tokens are fetched: one transfer for all


def can_decode(model: Any) -> bool:
    """Whether `greedy` can stand in for this model's `generate`."""
    return not hasattr(model, "saml_routers")


@torch.inference_mode()
def greedy(
    model: Any,
    windows: Iterable[Window],
    limits: Sequence[int],
    language: str | None = None,
    own_words: OwnWords | None = None,
) -> list[list[int]]:
    """The likeliest token at each step, without timestamps; a loop is said again (loops.py).

    Args:
        model: Whisper in evaluation mode, plain or with SAML layers.
        windows: the clips in order, those side by side that share a window's length. The mask is
            True where there is audio. Asked for one by one, as the encoder gets to them.
        limits: tokens of each clip's text at most; with the prompt no more than 448.
        language: code, of a multilingual model; None detects it, clip by clip.
        own_words: that are likelier than the model thinks.

    Returns:
        Token ids of each clip, without the prompt and the end.
    """
    prompt, decoder = _listen(model, windows, language, max(limits))
    step = Step(model.generation_config, decoder, prompt, own_words)
    loops: dict[int, Step] = {}
    texts = _say(step, limits, loops)
    for clip, again in loops.items():
        limit, cut = limits[clip], once(texts[clip])
        sampling = again.sample(draws(texts[clip], len(TEMPERATURES), limit), cut)
        ids = _say(again, [limit] * (1 + len(TEMPERATURES)))
        tried = [Tried(text, sampling.mean(row, len(text))) for row, text in enumerate(ids)]
        texts[clip] = best_of(tried, limit)
    return texts


def _say(
    step: Step, limits: Sequence[int], loops: dict[int, Step] | None = None
) -> list[list[int]]:
    """Token ids of each row up to its end, its limit or a loop.

    Rows that are loops are noted in `loops`, each with a step that can say it again.
    """
    texts: list[list[int]] = [[] for _ in limits]
    rows = list(range(len(limits)))  # which clip each row of the batch is
    going = set(rows)
    said = 0
    replay: Callable[[], None] | None = None
    while going:
        look()
        count = 1
        if replay is None:
            step(step.first + said)
        else:
            count = min(REPLAYED, max(limits[clip] for clip in going) - said)
            for _ in range(count):
                replay()
        new = step.said(step.first + said, count)
        said += count
        for row, (clip, tokens) in enumerate(zip(rows, new, strict=True)):
            if clip not in going or _goes_on(texts[clip], tokens, step.ends, limits[clip]):
                continue
            going.discard(clip)
            if loops is not None and is_loop(texts[clip], limits[clip]):
                loops[clip] = step.alone(row, 1 + len(TEMPERATURES))
        if going and replay is None and said > 1 and step.can_replay:
            replay = _capture(step)  # after a step of the same shapes, which compiles and allocates
        elif step.shrinks and replay is None and 0 < 2 * len(going) <= len(rows):
            # Copying the caches is soon paid for.
            keep = [row for row, clip in enumerate(rows) if clip in going]
            rows = [rows[row] for row in keep]
            step.keep(torch.tensor(keep, device=step.text.device))
    return texts


def _goes_on(text: list[int], tokens: Sequence[int], ends: set[int], limit: int) -> bool:
    """Lengthen a text by new tokens; False where it ends with one of them."""
    for token in tokens:
        if token in ends:
            return False
        text.append(token)
        if len(text) >= limit or repeated(text):
            return False
    return True


class Step:
    """One more token for every row, of static tensors alone: nothing here moves or waits.

    Rows whose clip has ended go on with the others; nobody reads what they say.

    Attributes:
        text: [B, positions + 1] token ids, the prompt first.
        first: tokens of the prompt.
        place: [1], where the token lies that the decoder reads next.
        ends: the ids that end a text.
        can_replay: whether to try a CUDA graph.
    """

    def __init__(
        self, generation: Any, decoder: Decoder, prompt: Tensor, own_words: OwnWords | None = None
    ) -> None:
        self.decoder, device = decoder, prompt.device
        self.never = _ids(generation.suppress_tokens, device)
        self.not_first = _ids(generation.begin_suppress_tokens, device)
        self.ends = set(_ids(generation.eos_token_id, "cpu").tolist())
        self.first = prompt.shape[1]
        self.text = F.pad(prompt, (0, decoder.positions + 1 - self.first))
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(decoder.positions, device=device)
        self.can_replay = _replays(device)
        self.sampling: _Sampling | None = None
        self.spelt = None if own_words is None else Spelt(own_words, len(prompt), device)

    def __call__(self, end: int | None = None) -> None:
        """Add a token after the `end` tokens there are; None is a graph, which cannot know.

        With `end`, attention reads that much of the caches; without, all of them, masked.
        """
        if end == self.first:  # the prompt, and the only step with tokens that may not begin
            logits = self.begin(end)
            logits.index_fill_(1, self.not_first, -torch.inf)
            self.place.fill_(end)
        else:
            tokens = self.text.index_select(1, self.place)
            known = None if end else (self.places <= self.place)[None, None, None]
            logits = self.decoder(tokens, self.place, end or len(self.places), known)
            self.place.add_(1)
        logits.index_fill_(1, self.never, -torch.inf)
        self.text.index_copy_(1, self.place, self.choose(logits))

    def begin(self, end: int) -> Tensor:
        """Logits [B, V] after the prompt of `end` tokens."""
        return self.decoder(self.text[:, :end], self.places[:end], end)

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, [B, 1], from logits [B, V]."""
        likely = self.likely(logits)
        if self.sampling is None:
            return self.spell(likely.argmax(-1, keepdim=True))
        return self.spell(self.sampling(logits, likely, self.place))

    def likely(self, logits: Tensor) -> Tensor:
        """Logits [B, V] that say which token comes next: own words have their bonus."""
        return logits if self.spelt is None else self.spelt.biased(logits)

    def spell(self, tokens: Tensor) -> Tensor:
        """The tokens [B, 1] that were chosen; own words go on with them."""
        if self.spelt is not None:
            self.spelt.move(tokens)
        return tokens

    def said(self, start: int, count: int) -> list[list[int]]:
        """The tokens of each row from `start` on: waits for them."""
        return self.text[:, start : start + count].tolist()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        self.text = self.text[rows]
        self.decoder.keep(rows)
        if self.spelt is not None:
            self.spelt.keep(rows)

    @property
    def shrinks(self) -> bool:
        """Whether rows may be dropped: what was sampled is asked for in the end."""
        return self.sampling is None

    def alone(self, row: int, times: int) -> Self:
        """A step of its own for one row, so many times over, from the beginning."""
        one = copy(self)
        one.decoder = self.decoder.alone(row, times)
        prompt = self.text[row : row + 1, : self.first].repeat(times, 1)
        one.text = F.pad(prompt, (0, self.text.shape[1] - self.first))
        one.place = torch.zeros_like(self.place)
        one.spelt = None if self.spelt is None else self.spelt.anew(times)
        one.can_replay = _replays(prompt.device)
        return one

    def sample(self, uniform: Tensor, given: Sequence[int]) -> _Sampling:
        """From now on the first row says what is given, the others draw by `uniform` [T, n]."""
        self.decoder.take_turn()
        ended = [*given, min(self.ends)]
        self.sampling = _Sampling(uniform.to(self.text.device), ended, self.text, self.first)
        return self.sampling


class _Sampling:
    """A given text and drawn ones, and what their tokens were worth.

    A token is drawn by the inverse of its distribution function: one random number for each.
    """

    def __init__(self, uniform: Tensor, given: Sequence[int], text: Tensor, first: int) -> None:
        """`uniform` is float64 [T, n], for rows 1 to T of `text` after a prompt of `first`."""
        self.temperatures = uniform.new_tensor((1.0, *TEMPERATURES)).unsqueeze(1)
        self.uniform = F.pad(uniform, (first, text.shape[1] - first - uniform.shape[1], 1, 0))
        self.given = torch.full_like(text, -1)
        self.given[0, first : first + len(given)] = text.new_tensor(given)
        self.first, self.log_probs = first, torch.zeros_like(self.uniform)

    def __call__(self, logits: Tensor, likely: Tensor, place: Tensor) -> Tensor:
        """Token ids [B, 1] at `place` [1]: drawn by `likely` [B, V], worth what `logits` say."""
        logits = logits.double()
        below = (likely.double() / self.temperatures).softmax(-1).cumsum(-1)
        drawn = self.uniform.index_select(1, place) * below[:, -1:]
        tokens = torch.searchsorted(below, drawn, right=True).clamp_(max=logits.shape[1] - 1)
        given = self.given.index_select(1, place)
        tokens = torch.where(given < 0, tokens, given)
        self.log_probs.index_copy_(1, place, logits.log_softmax(-1).gather(1, tokens))
        return tokens

    def mean(self, row: int, length: int) -> float:
        """Of the log-probabilities of a row's text of `length` tokens, and of its end."""
        return float(self.log_probs[row, self.first : self.first + length + 1].mean())


def _replays(device: torch.device) -> bool:
    return device.type == "cuda"


def _capture(step: Step) -> Callable[[], None] | None:
    """What replays the step as a CUDA graph; None where it cannot be captured."""
    step.can_replay = False
    try:
        return capture(step, step.text.device)[1]
    except RuntimeError as error:
        warnings.warn(f"decoding goes on without a CUDA graph: {error}", stacklevel=2)
        return None


def _listen(
    model: Any, windows: Iterable[Window], language: str | None, limit: int
) -> tuple[Tensor, Decoder]:
    """Encode every window: the prompt [B, n], and a decoder that attends to what was encoded."""
    prompts: list[Tensor] = []
    cross = encode(model, windows, lambda x: prompts.append(_prompt(model, x, language)))
    prompt = torch.cat(prompts)
    return prompt, Decoder(model, cross, prompt.shape[1] + limit)


def _prompt(model: Any, encoded: Tensor, language: str | None) -> Tensor:
    """What the text begins with: [B, n], n = 2, or with language and task 4."""
    generation = model.generation_config
    ids: list[Any] = [generation.decoder_start_token_id]
    if getattr(generation, "is_multilingual", False):
        if language is None:
            ids.append(model.detect_language(encoder_outputs=BaseModelOutput(encoded)))
        else:
            ids.append(generation.lang_to_id[f"<|{language}|>"])
        ids.append(generation.task_to_id["transcribe"])
    if hasattr(generation, "no_timestamps_token_id"):
        ids.append(generation.no_timestamps_token_id)
    prompt = torch.empty(len(encoded), len(ids), dtype=torch.int64, device=encoded.device)
    for column, value in enumerate(ids):
        prompt[:, column] = value
    return prompt


def _ids(values: int | list[int] | None, device: torch.device | str) -> Tensor:
    listed = [values] if isinstance(values, int) else values or []
    return torch.tensor(listed, dtype=torch.int64, device=device)
