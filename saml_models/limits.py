"""How many tokens a clip may take: a model that repeats itself is stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from saml_models.audio import SAMPLE_RATE

__all__ = ["OwnLimits", "token_limit"]

# English speech stays under 5 tokens a second; more is the model repeating itself.
TOKENS_PER_SECOND, SPARE_TOKENS = 8, 12
MAX_TOKENS = 440


class OwnLimits(StoppingCriteria):
    """Each clip ends at its own limit of new tokens, all its beams with it."""

    def __init__(self, limits: Sequence[int]) -> None:
        self.limits, self.prompt = torch.tensor(limits), 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows [B * beams] are done."""
        rows, length = input_ids.shape
        self.prompt = self.prompt or length - 1  # asked first after one new token
        limits = self.limits.repeat_interleave(rows // len(self.limits))
        return (limits <= length - self.prompt).to(input_ids.device)


def token_limit(samples: int) -> int:
    """New tokens at most for a clip of `samples` at 16 kHz."""
    return min(MAX_TOKENS, int(samples / SAMPLE_RATE * TOKENS_PER_SECOND) + SPARE_TOKENS)
