"""What a calibration looks at: rows of both sides, and sums over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_models.compress.calibration_speech import (
    CalibrationClip,
)
from saml_models.data.audio import SAMPLE_RATE

__all__ = ["Moments", "Pairs", "Rows", "attended", "counted_frames", "shift_of", "unfolded"]

TOGETHER = 4096  # rows in one matrix product
AFTER = 1.0  # seconds after the speech that count fully
SPARSE = 10  # of the frames later on, one in so many is looked at

Pairs = Iterable[tuple[Tensor, Tensor]]


class Moments:
    """Sums over inputs x' [T, K] of a stage's rounded side and what goes with them, y [T, M]."""

    def __init__(self, width: int, others: int) -> None:
        self.inputs = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(others, width, dtype=torch.float64)
        self.input_sum = torch.zeros(width, dtype=torch.float64)
        self.other_sum = torch.zeros(others, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """One product in float32 for up to `TOGETHER` rows."""
        self.inputs += x.T @ x
        self.cross += y.T @ x
        self.input_sum += x.sum(dim=0, dtype=torch.float64)
        self.other_sum += y.sum(dim=0, dtype=torch.float64)
        self.rows += len(x)

    def means(self, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """E[x' x'^T], E[y x'^T], E[x'], E[y]; the first two less the means' products if centred."""
        x, y = self.input_sum / self.rows, self.other_sum / self.rows
        inputs, cross = self.inputs / self.rows, self.cross / self.rows
        if centred:
            inputs, cross = inputs - x.outer(x), cross - y.outer(x)
        return inputs, cross, x, y


@dataclass
class Rows:
    """Where both sides are in every clip, one clip below the other.

    Attributes:
        spans: of each clip.
        x, y: [R, d], on the full and on the rounded side.
        counted: int64, the rows that layers are rounded for.
    """

    spans: list[slice]
    x: Tensor
    y: Tensor
    counted: Tensor

    @classmethod
    def of(cls, x: list[Tensor], y: list[Tensor], counted: list[Tensor]) -> Rows:
        """From each clip's own; `counted` bool [T]."""
        ends = list(accumulate(len(part) for part in x))
        spans = [slice(end - len(part), end) for end, part in zip(ends, x, strict=True)]
        return cls(spans, torch.cat(x), torch.cat(y), torch.cat(counted).nonzero().squeeze(1))

    def pairs(
        self,
        rounded: Callable[[Tensor], Tensor],
        full: Callable[[Tensor], Tensor],
    ) -> Pairs:
        """What is made of some of the counted rows on both sides."""
        for index in self.counted.split(TOGETHER):
            yield rounded(index), full(index)


def counted_frames(clip: CalibrationClip, count: int, rate: int) -> Tensor:
    """Bool [count]: frames up to a second past the speech, and one in `SPARSE` of those after it.

    Args:
        clip: that they are of.
        count: of frames, `rate` of them a second.
    """
    after = torch.arange(count) - round((len(clip.samples) / SAMPLE_RATE + AFTER) * rate)
    return (after < 0) | (after % SPARSE == 0)


def unfolded(conv: Any, x: Tensor) -> Tensor:
    """x [1, K, T] -> [T', K * kernel]: what the filters of a convolution are multiplied with."""
    (kernel,), (stride,), (padding,) = conv.kernel_size, conv.stride, conv.padding
    columns = F.unfold(x.unsqueeze(2), (1, kernel), padding=(0, padding), stride=(1, stride))
    return columns[0].T


def attended(attention: Any, hidden: Tensor, encoded: Tensor | None, causal: bool) -> Tensor:
    """Attention of one clip before its output projection: hidden [T, d] -> [T, d]."""
    source = hidden if encoded is None else encoded

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), attention.num_heads, -1).transpose(0, 1)

    mixed = F.scaled_dot_product_attention(
        heads(attention.q_proj(hidden) * attention.scaling),
        heads(attention.k_proj(source)),
        heads(attention.v_proj(source)),
        is_causal=causal,
        scale=1.0,
    )
    return mixed.transpose(0, 1).reshape(len(hidden), -1)


def shift_of(table: Tensor, said: Tensor) -> Tensor:
    """What to subtract from every row: half the mean of what is said, half the plain mean.

    Args:
        table: [V, d].
        said: [V], how often the model says each token.
    """
    often = (said / said.sum()).float() @ table
    return (often + table.mean(dim=0)) / 2
