"""One launch for several layers' calls with the same x."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saml_kernels.backends.triton.launcher import on_device
from saml_kernels.backends.triton.single import MEMBERS, Member, together_plan
from saml_kernels.ops.prepared import Kind

__all__ = ["MEMBERS", "Together"]

BIAS = 6  # where `Facts.kinds` has the bias


class Together:
    """The calls of some kinds, each of another layer, without gradients.

    Attributes:
        possible: whether one launch can serve them: they take the route of a single launch, and
            differ in nothing that a kernel is compiled for but whether there is a bias.
    """

    def __init__(self, kinds: Sequence[Kind], calls: Sequence[tuple[Tensor | None, ...]]) -> None:
        """`calls` are the tensors of each: lora_a, lora_b, router (or its gates) and bias."""
        first = kinds[0]
        # Kinds belong to layers, which may go, or move.
        self.kinds = [weakref.ref(kind) for kind in kinds]
        biases = {k.facts.kinds[BIAS] for k in kinds} - {None}
        dtype, aligned = next(iter(biases), (first.dtype, True))
        # One without a bias is given zeros.
        facts = {k.facts._replace(bias=True, kinds=_with_bias(k, (dtype, True))) for k in kinds}
        routed = first.gating is not None or not first.facts.columns
        self.possible = (
            len(facts) == 1
            and len(biases) <= 1
            and aligned
            and len({k.scaling for k in kinds}) == 1
            and first.plan.route == "single"
            and routed
            and not (first.facts.speakers or first.facts.a_block or first.facts.b_block)
            and all(router is None or router.is_contiguous() for _, _, router, _ in calls)
        )
        self.zeros: Tensor | None = None
        if self.possible:
            self.single = together_plan(facts.pop(), len(kinds))
            if any(bias is None for *_, bias in calls):
                self.zeros = torch.zeros(first.facts.n, dtype=dtype, device=first.device)

    def of(self, kinds: Sequence[Kind]) -> bool:
        """Whether it was made for these."""
        return all(own() is kind for own, kind in zip(self.kinds, kinds, strict=True))

    def __call__(
        self, x: Tensor, kinds: Sequence[Kind], calls: Sequence[tuple[Tensor | None, ...]]
    ) -> list[Tensor]:
        """y [..., N] of each."""
        first = kinds[0]
        router = calls[0][2]
        assert router is not None
        x, _, _ = first.given(x, router, None)
        members: list[Member] = []
        for kind, (a, b, router, bias) in zip(kinds, calls, strict=True):
            codes, scales, table = kind.parts
            members.append((codes, scales, a, router, b, self.zeros if bias is None else bias))
        with on_device(first.device):
            y = self.single.together(x, table, members, first.scaling)
        return [part.view(first.shape) for part in y.unbind(0)]


def _with_bias(kind: Kind, bias: tuple[torch.dtype, bool]) -> tuple[Any, ...]:
    kinds = kind.facts.kinds
    return (*kinds[:BIAS], bias, *kinds[BIAS + 1 :])
