"""Many speakers in one call, for backends that know one: the base once, the experts by group."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.quant import QuantizedTensor
from saml_kernels.reference import Gradients, experts_backward, experts_forward

__all__ = ["backward", "forward"]


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
    y = backend.forward(x, weight, *_none(lora_a, lora_b, gates), bias, scaling)
    for s, rows in _groups(speakers, len(lora_a)):
        y[rows] += scaling * experts_forward(x[rows], lora_a[s], lora_b[s], gates[rows])
    return y


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
