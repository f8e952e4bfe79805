"""What a call of the operator launches, decided once for its shape and started many times.

A `Facts` says everything that the choice depends on, but no tensor's address: layers of one shape
share a plan. `ForwardPlan` and `BackwardPlan` hold tiles, grids and compile-time facts; a call
allocates results and scratch and hands the pointers over. The mathematics and its names are those
of `saml_kernels/reference.py`; the routes are explained in this package's docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_kernels.backends.reference import Gradients
from saml_kernels.backends.triton.backward_steps import ExpertGradients, Finish, OneLaunch
from saml_kernels.backends.triton.configs import on_change
from saml_kernels.backends.triton.facts import CUBLAS_COLUMNS, Facts, WeightParts
from saml_kernels.backends.triton.single import Single
from saml_kernels.backends.triton.stacked import Stacked
from saml_kernels.backends.triton.steps import Decode, Fill, Persistent, Product, Projection

__all__ = ["BackwardPlan", "ForwardPlan", "backward_plan", "forward_plan"]


class ForwardPlan:
    """The forward of calls of one kind."""

    def __init__(self, facts: Facts, keep: bool) -> None:
        """With `keep` a call also returns P and the gates, which the backward wants."""
        f = self.facts = facts
        config = f.config("forward")
        self.keep = keep and f.columns > 0
        if self.keep and config.route == "decode":
            config = replace(config, route="single")  # which keeps P where it adds it up
        self.route = config.route
        self.stride = f.columns
        self.whole: Single | Decode | Stacked | None = None
        self.project = self.product = self.persistent = self.fill = None
        if config.route == "single":
            self.whole = Single(f, config, keep=self.keep)
            return
        if config.route == "decode" and f.columns:
            self.whole = Decode(f, config)
            return
        if config.route == "stacked":
            self.whole = Stacked(f, config, keep=self.keep)
            return
        pad = 0
        described = config.loads == "descriptors"
        if config.route == "scratch" or described:
            pad = -f.columns % CUBLAS_COLUMNS
            self.fill = Fill(f, beside=f.columns + pad)
            self.stride = f.columns + pad + (0 if described else f.k)
        elif config.route == "dense":
            self.fill = Fill(f)
        if f.columns:
            self.project = Projection(
                f, plain=self.keep, copy=config.route == "scratch", pad=pad
            )  # fmt: skip
        if described:
            self.persistent = Persistent(f, config, self.stride)
        elif config.route != "scratch":
            self.product = Product(f, config)

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
        """y [M, N] of contiguous x; P [M, R] and the gates [M, E] where they are kept, or None.

        `gates` are given ones [.., E], or a token router's weight.
        """
        f = self.facts
        if self.whole is not None:
            given = (x, weight, a, a_scales, b, b_scales, gates, bias, speakers, scaling)
            return self.whole(*given)
        router = f.gating is not None
        plain = made = hidden = None
        if self.route == "scratch":
            wide = x.view(f.m, f.k)
            if self.project is not None:
                wide = x.new_empty((f.m, self.stride))
                plain, made = self.project(
                    x, a, a_scales, gates, speakers, scaling, wide[:, f.k :], self.stride, wide
                )
            assert self.fill is not None
            scratch = self.fill(weight, x, b if f.columns else None, b_scales)
            bias = None if bias is None else bias.to(x.dtype)
            y = F.linear(wide, scratch, bias)
        else:
            if self.project is not None:
                hidden = x.new_empty((f.m, self.stride))
                plain, made = self.project(
                    x, a, a_scales, gates, speakers, scaling, hidden, self.stride
                )
            if self.fill is not None:
                beside = (b, b_scales) if f.columns and self.persistent is not None else ()
                weight = self.fill.parts(weight, x, *beside)
            if self.persistent is not None:
                y = self.persistent(x, weight, bias, hidden)
            elif f.columns:
                assert self.product is not None
                y = self.product(x, weight, bias, speakers, hidden, b, b_scales, made)
            else:
                assert self.product is not None
                y = self.product(x, weight, bias, None)
        return y, plain if self.keep else None, made if self.keep and router else None


class BackwardPlan:
    """The backward of calls of one kind, for the gradients in `needs`: x, lora_a, lora_b, gates.

    dY is read by two launches, and four at most make every gradient:

    - `backward` reads dY, W, A, B, V, P and the gates: dX, dP, dZ, dG. Route "dense" has
      `dequantize` read the codes before, and `backward` the scratch.
    - Route "scratch" in its place: `dequantize` reads the codes and B and writes [W | B], cuBLAS
      reads dY for [dY W | dY B] (rounded to the type of dY), `finish_backward` reads that, A, V, P
      and the gates.
    - `gradients` reads dY again, X, [dP | dZ], P and the gates: dA, dB, dV.
    - Where P was not kept, `project` reads X and A first, and "scratch" becomes "dense".
    """

    def __init__(self, facts: Facts, needs: tuple[bool, bool, bool, bool], kept: bool) -> None:
        """`kept` says that P and the gates are given, as the forward left them."""
        f = self.facts = facts
        need_x, need_a, need_b, need_gates = self.needs = needs
        config = f.config("backward")
        routed = f.gating is not None and f.columns > 0
        through = f.columns > 0 and (need_gates or (routed and need_x))
        # Without gates at hand their router has to be asked again.
        self.again = None
        if f.columns and not kept and (need_b or through or routed):
            self.again = Projection(f, plain=True, copy=False, pad=0)
            if config.route == "scratch":
                config = replace(config, route="dense", split=1)
        self.fill: Fill | None = None
        self.one: OneLaunch | None = None
        self.finish: Finish | None = None
        self.gradients: ExpertGradients | None = None
        if need_x and config.route == "scratch":
            pad = -f.columns % CUBLAS_COLUMNS if f.columns else 0
            self.fill = Fill(f, beside=f.columns + pad)
            if f.columns:
                self.finish = Finish(f, f.k + f.columns + pad, through)
        else:
            if need_x and config.route == "dense":
                self.fill = Fill(f)
            if need_x or (f.columns and (need_a or through)):
                self.one = OneLaunch(f, config, dx=need_x, through=through)
        of_router = routed and need_gates
        if f.columns and (need_a or need_b or of_router):
            self.gradients = ExpertGradients(f, need_a, need_b, of_router)

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        weight: WeightParts,
        a: Tensor,
        b: Tensor,
        gates: Tensor,
        speakers: Tensor | None,
        scaling: float,
        plain: Tensor | None = None,
        made: Tensor | None = None,
        dx_dtype: torch.dtype | None = None,
    ) -> Gradients:
        """Gradients of x [M, K], lora_a, lora_b and the gates (or router) from contiguous dy, x.

        Args:
            dy, x, weight, a, b, gates, speakers, scaling: as the forward was given them.
            plain, made: P and the gates that the forward kept.
            dx_dtype: of dX; that of x by default.
        """
        f = self.facts
        if not f.columns:
            zeros = (torch.zeros_like(t) for t in (a, b, gates))
            da, db, dg = (z if n else None for z, n in zip(zeros, self.needs[1:], strict=True))
            return self._base(dy, weight, dx_dtype), da, db, dg
        if self.again is not None:
            hidden = x.new_empty((f.m, f.columns))
            plain, made = self.again(x, a, None, gates, speakers, scaling, hidden, f.columns)
        router = None if f.gating is None else gates
        row_gates = gates if made is None or router is None else made
        dx = small = dgates = None
        if self.finish is not None:
            assert self.fill is not None
            wide = dy.view(f.m, f.n) @ self.fill(weight, dy, b)
            dx, small, dgates = self.finish(wide, a, router, row_gates, plain, scaling, dx_dtype)
        elif self.one is not None:
            if self.fill is not None:
                weight = self.fill.parts(weight, dy)
            dx, small, dgates = self.one(
                dy, weight, b, a, router, row_gates, plain, speakers, scaling, dx_dtype
            )
        da = db = dv = None
        if self.gradients is not None:
            da, db, dv = self.gradients(
                small, x, plain, row_gates, dy, speakers, a, b, router, scaling
            )
        return dx, da, db, dgates if router is None else dv

    def _base(self, dy: Tensor, weight: WeightParts, dtype: torch.dtype | None) -> Tensor | None:
        """dX of a weight without experts."""
        if self.one is None:
            if self.fill is None:
                return None
            dx = dy.view(self.facts.m, self.facts.n) @ self.fill(weight, dy)
            return dx if dtype is None else dx.to(dtype)
        if self.fill is not None:
            weight = self.fill.parts(weight, dy)
        return self.one(dy, weight, None, None, None, None, None, None, 1.0, dtype)[0]


forward_plan: Callable[[Facts, bool], ForwardPlan] = lru_cache(maxsize=2048)(ForwardPlan)
backward_plan: Callable[[Facts, tuple[bool, ...], bool], BackwardPlan] = lru_cache(maxsize=2048)(
    BackwardPlan
)
on_change(forward_plan.cache_clear)  # type: ignore[attr-defined]
on_change(backward_plan.cache_clear)  # type: ignore[attr-defined]
