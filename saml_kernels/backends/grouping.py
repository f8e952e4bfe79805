"""Many speakers in one call, for backends that know one: the base once, the experts by group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_kernels.backends.reference import Gradients, everybodys_logits, experts_backward
from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["backward", "forward", "logits"]

# Where speakers alternate, a copy of each row's matrix costs less than a product for each speaker
# up to so many rows and so many elements of a matrix.
FEW_ROWS, FEW_ELEMENTS = 256, 8192


class Runs:
    """Rows in stretches of one speaker each: the products of a stretch are one matrix product."""

    def __init__(self, speakers: Tensor, count: int) -> None:
        """The stretches of `speakers` (int32 [M]), of whom there are `count`.

        Raises:
            SAMLError: a speaker index is out of range.
        """
        self.speakers, self.order = speakers, None
        self.found, lengths = speakers.unique_consecutive(return_counts=True)
        self.lengths: list[int] = lengths.tolist()
        self.names: list[int] = self.found.tolist()
        wrong = [s for s in self.names if not 0 <= s < count]
        if wrong:
            raise SAMLError(
                f"speakers: holds {wrong[0]}; expected 0..{count - 1} for these experts"
            )
        self.even = len(set(self.lengths)) <= 1
        self.everyone_once = self.even and self.names == list(range(count))
        if len(set(self.names)) < len(self.names):
            self.order = speakers.argsort(stable=True)
            lengths = speakers.bincount(minlength=count)
            self.names = lengths.nonzero()[:, 0].tolist()
            self.lengths = lengths[self.names].tolist()

    def product(self, x: Tensor, stacks: Tensor) -> Tensor:
        """Each row by the transpose of its speaker's matrix: [M, K] and [S, n, K] -> [M, n]."""
        if not len(x):
            return x.new_empty(0, stacks.shape[1])
        few = stacks[0].numel() <= FEW_ELEMENTS
        if self.everyone_once or (self.even and few):
            own = stacks if self.everyone_once else stacks[self.found]
            return (x.unflatten(0, (len(own), -1)) @ own.transpose(1, 2)).flatten(0, 1)
        if len(x) <= FEW_ROWS and few:
            return (x.unsqueeze(1) @ stacks[self.speakers].transpose(1, 2)).squeeze(1)
        return self.each(lambda s, part: F.linear(part, stacks[s]), x)

    def each(self, do: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`do(speaker, *parts)` for each speaker's rows [m, ...]; results in the rows' order."""
        if self.order is not None:
            tensors = tuple(t[self.order] for t in tensors)
        parts = zip(self.names, *(t.split(self.lengths) for t in tensors), strict=True)
        y = torch.cat([do(*part) for part in parts])
        return y if self.order is None else y[self.order.argsort()]


def logits(x: Tensor, router: Tensor, speakers: Tensor) -> Tensor:
    """x V_s^T, s the speaker of a row: x [..., K], router [S, E, K], speakers [...] -> [..., E].

    On a GPU nothing here waits for the device, so that it can be captured.

    Raises:
        SAMLError: on a CPU, a speaker index that is out of range.
    """
    if x.device.type != "cpu":
        return everybodys_logits(x, router, speakers)
    index = speakers.expand(x.shape[:-1]).reshape(-1)
    rows = Runs(index, len(router)).product(x.reshape(-1, x.shape[-1]), router)
    return rows.view(*x.shape[:-1], router.shape[1])


def forward(
    backend: ModuleType,
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    speakers: Tensor,
) -> Tensor:
    """y [M, N]; lora_a [S, E, r, K], lora_b [S, E, N, r], speakers int32 [M].

    Raises:
        SAMLError: a speaker index is out of range.
    """
    runs = Runs(speakers, len(lora_a))
    long = len(x) > 0 and min(runs.lengths) >= getattr(backend, "STRETCH", math.inf)
    if long or len(runs.names) == 1:
        return runs.each(
            lambda s, x, gates: backend.forward(
                x, weight, lora_a[s], lora_b[s], gates, bias, scaling
            ),
            x, gates,
        )  # fmt: skip
    y = backend.forward(x, weight, *_none(lora_a, lora_b, gates), bias, scaling)
    hidden = runs.product(x, lora_a.flatten(1, 2))
    hidden = hidden * (scaling * gates).repeat_interleave(lora_a.shape[2], dim=-1)
    # [S, N, E * r]: no copy where the memory is laid out as [S, N, E, r].
    return y + runs.product(hidden, lora_b.transpose(1, 2).flatten(2))


def backward(
    backend: ModuleType,
    dy: Tensor,
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    scaling: float,
    needs: tuple[bool, bool, bool, bool],
    speakers: Tensor,
) -> Gradients:
    """Gradients of (x, lora_a, lora_b, gates); zero for a speaker without rows."""
    base = (needs[0], False, False, False)
    dx = backend.backward(dy, x, weight, *_none(lora_a, lora_b, gates), scaling, base)[0]
    wanted = zip((lora_a, lora_b, gates), needs[1:], strict=True)
    da, db, dg = (torch.zeros_like(t) if need else None for t, need in wanted)
    for s, rows in _groups(speakers, len(lora_a)):
        own = experts_backward(dy[rows], x[rows], lora_a[s], lora_b[s], gates[rows], scaling, needs)
        for total, index, part in zip((dx, da, db, dg), (rows, s, s, rows), own, strict=True):
            if total is not None and part is not None:
                total[index] += part
    return dx, da, db, dg


def _none(lora_a: Tensor, lora_b: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return lora_a[0, :0], lora_b[0, :0], gates[:, :0]


def _groups(speakers: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """(speaker, its rows) for each that occurs."""
    for s in speakers.unique().tolist():
        if not 0 <= s < count:
            raise SAMLError(f"speakers: holds {s}; expected 0..{count - 1} for these experts")
        yield s, (speakers == s).nonzero()[:, 0]
