"""Texts that run into a loop ("six, five, six, five, ..."): seen, stopped, and said again.

One rule for every way of decoding, on token ids alone. A loop is a text whose end repeats itself,
that compresses as no speech does, or that is longer than its clip allows. Instead of it are tried
the same text with what it repeats said once and, as openai-whisper does it, texts sampled at rising
temperatures; of those that are no loops the most likely one is kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "TEMPERATURES",
    "Tried",
    "best_of",
    "draws",
    "is_loop",
    "once",
    "repeated",
    "said_again",
    "seed",
]

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)  # openai-whisper's, after 0
COMPRESSION = 2.0  # of token ids: three times the same; openai-whisper's 2.4 of the text

# People say "no, no, no, no, no" and refrains; nobody says so much of one thing.
COPIES, SPAN = 4, 12  # of what is repeated, and tokens of all copies, at least
LONGEST = 32  # tokens of what is repeated
_BYTES = 2  # of a token id, for compression


@dataclass(frozen=True)
class Tried:
    """A text as token ids, without prompt and end, and its tokens' mean log-probability."""

    ids: list[int]
    log_prob: float


def repeated(ids: Sequence[int]) -> int:
    """Tokens of what the end of a text repeats over and over; 0 where it does not.

    Asked while decoding: most texts are told by comparing their last token with few others.
    """
    size = len(ids)
    for period in range(1, min(LONGEST, size // COPIES) + 1):
        span = max(SPAN, COPIES * period)
        if span > size or ids[-1] != ids[-1 - period]:
            continue
        if all(ids[i] == ids[i - period] for i in range(size - 1, size - span + period - 1, -1)):
            return period
    return 0


def is_loop(ids: Sequence[int], limit: int) -> bool:
    """Whether a whole text is a loop; `limit` says how many tokens its clip allows."""
    return len(ids) >= limit or repeated(ids) > 0 or _compression(ids) > COMPRESSION


def best_of(tried: Sequence[Tried], limit: int) -> list[int]:
    """The most likely of the texts that are no loops, else the first; `limit` as for `is_loop`."""
    sound = [one for one in tried if not is_loop(one.ids, limit)]
    return max(sound, key=lambda one: one.log_prob, default=tried[0]).ids


def draws(first: Sequence[int], rows: int, steps: int) -> Tensor:
    """Random numbers in [0, 1) for sampling: float64 [rows, steps], the same for the same loop."""
    generator = torch.Generator().manual_seed(seed(first))
    return torch.rand(rows, steps, dtype=torch.float64, generator=generator)


def seed(first: Sequence[int]) -> int:
    """For the random numbers that replace a loop: the same speech gives the same text."""
    return zlib.crc32(_bytes(first))


def said_again(
    generate: Callable[..., Any], first: Sequence[int], limit: int, end: int, device: torch.device
) -> list[int]:
    """What stands in for a loop of a model that decodes through transformers' `generate`.

    Args:
        generate: the model's, with the clip and its prompt given, all its options to come.
        first: the loop.
        limit: tokens of the clip's text.
        end: the token that ends a text.
        device: of the model.
    """

    def tried(**options: Any) -> Tried:
        generated = generate(
            num_beams=1, output_logits=True, return_dict_in_generate=True, **options
        )
        logits = torch.stack(generated.logits)[:, 0].float()
        tokens = generated.sequences[0, -len(logits) :]
        worth = logits.log_softmax(-1).gather(-1, tokens.to(logits.device)[:, None])
        ids = tokens.tolist()
        ids = ids[: ids.index(end)] if end in ids else ids
        return Tried(ids, float(worth[: len(ids) + 1].mean()))

    given = [*once(first), end]
    start: list[int] = []  # of the prompt, learnt when first asked

    def next_of(row: int, before: Tensor) -> list[int]:
        start[:] = start or [len(before)]
        return [given[min(len(before) - start[0], len(given) - 1)]]

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed(first))
        texts = [tried(do_sample=False, prefix_allowed_tokens_fn=next_of)]
        texts += [tried(do_sample=True, top_k=0, temperature=t) for t in TEMPERATURES]
    return best_of(texts, limit)


def once(ids: Sequence[int]) -> list[int]:
    """A text up to the end of the first copy of what it repeats."""
    end = len(ids)
    while period := repeated(ids[:end]):
        while end > period and ids[end - 1] == ids[end - 1 - period]:
            end -= 1
    return list(ids[:end])


def _compression(ids: Sequence[int]) -> float:
    """How much shorter zlib makes it; below 1 for a short text."""
    plain = _bytes(ids)
    return len(plain) / len(zlib.compress(plain))


def _bytes(ids: Sequence[int]) -> bytes:
    return b"".join((token & 0xFFFF).to_bytes(_BYTES, "little") for token in ids)
