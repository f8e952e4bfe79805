"""The step that leaves [W ; A] to cuBLAS as one product, and reads its result once.

x is read by that product alone and never copied, which is right where N is short against K: what is
read once more is [Y0 | P | Z] = X [W ; A ; router]^T. With a token router all three are float32,
because logits that are rounded would choose other experts; else P and Y0 are rounded to the type of
x before the experts are added (2^-11 of each number in float16, 2^-8 in bfloat16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_kernels.backends.triton.configs import Config
from saml_kernels.backends.triton.facts import CUBLAS_COLUMNS, Facts, WeightParts
from saml_kernels.backends.triton.steps import Fill, Finish

__all__ = ["Stacked"]


class Stacked:
    """The whole forward of one speaker: `dequantize`, cuBLAS, `finish`."""

    def __init__(self, facts: Facts, config: Config, *, keep: bool) -> None:
        """`keep` as in `ForwardPlan`."""
        f = self.facts = facts
        self.routed = f.gating is not None
        columns = f.columns + (f.experts if self.routed else 0)
        below = columns + -(f.n + columns) % CUBLAS_COLUMNS
        self.fill = Fill(f, below=below)
        stride = f.n + below
        self.finish = Finish(
            f, config, split=1, base_stride=stride, stride=stride, keep=keep
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        weight: WeightParts,
        a: Tensor,
        a_scales: Tensor | None,
        b: Tensor,
        b_scales: Tensor | None,
        gates: Tensor,
        bias: Tensor | None,
        speakers: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y [M, N]; P [M, R] and a router's gates [M, E] where they are kept."""
        f = self.facts
        router, given = (gates, None) if self.routed else (None, gates)
        scratch = self.fill(weight, x, a, a_scales, router)
        rows = x.view(f.m, f.k)
        wide = _float32_product(rows, scratch) if self.routed else F.linear(rows, scratch)
        return self.finish(
            wide, wide[:, f.n :], b, b_scales, given, bias, None, scaling, x.dtype
        )  # fmt: skip


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T as it is accumulated, not rounded to the type of x."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())
