"""How many tokens a clip may take: a model that repeats itself is stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from saml_models.data.audio import SAMPLE_RATE
from saml_models.models.loops import COPIES, LONGEST, repeated

__all__ = ["OwnLimits", "token_limit"]

# English speech stays under 5 tokens a second; more is the model repeating itself.
TOKENS_PER_SECOND, SPARE_TOKENS = 8, 12
MAX_TOKENS = 440
TAIL = 2 * LONGEST * COPIES  # tokens that a loop is looked for in, timestamps among them
SELDOM = 4  # tokens from one look for loops to the next


class OwnLimits(StoppingCriteria):
    """Each clip ends at its own limit of new tokens, all its beams with it, and a loop at once."""

    def __init__(self, limits: Sequence[int], prompt: int = 0, text: float = math.inf) -> None:
        """Limits for each clip.

        Args:
            limits: new tokens of each.
            prompt: tokens before them; 0 is learnt when first asked, after one new token.
            text: the first id that is no text: timestamps neither count nor hide a loop.
        """
        self.limits, self.prompt, self.text = torch.tensor(limits), prompt, text

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows [B * beams] are done."""
        rows, length = input_ids.shape
        self.prompt = self.prompt or length - 1
        limits = self.limits.repeat_interleave(rows // len(self.limits))
        said = length - self.prompt
        if math.isfinite(self.text):
            done = (input_ids[:, self.prompt :] < self.text).sum(-1).cpu() >= limits
        else:
            done = limits <= said
        if said % SELDOM == 0:
            tails = input_ids[:, max(self.prompt, length - TAIL) :].tolist()
            done |= torch.tensor([repeated([t for t in r if t < self.text]) > 0 for r in tails])
        return done.to(input_ids.device)


def token_limit(samples: int) -> int:
    """New tokens at most for a clip of `samples` at 16 kHz."""
    return min(MAX_TOKENS, int(samples / SAMPLE_RATE * TOKENS_PER_SECOND) + SPARE_TOKENS)
