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
from saml_kernels.backends.triton.configs import on_change
from saml_kernels.backends.triton.facts import Facts, WeightParts, power_of_2, tiles
from saml_kernels.backends.triton.launcher import Launcher
from saml_kernels.backends.triton.signature import Varying
from saml_kernels.backends.triton.single import Single
from saml_kernels.backends.triton.steps import Decode, Fill, Product, Projection, narrow_tiles

__all__ = ["BackwardPlan", "ForwardPlan", "backward_plan", "forward_plan"]

SHARE_TOKENS = 1024  # a share of the reduction over tokens, in dA and dB
GRADIENT_TILE = 64
CUBLAS_COLUMNS = 8  # widened operands are padded to this: else cuBLAS leaves its aligned kernels


class ForwardPlan:
    """The forward of calls of one kind."""

    def __init__(self, facts: Facts, keep: bool) -> None:
        """With `keep` a call also returns P and the gates, which the backward wants."""
        f = self.facts = facts
        config = f.config("forward")
        if keep and f.columns and config.route in ("single", "decode"):
            config = replace(config, route="split")  # whose projection is whole
        self.route, self.keep = config.route, keep and f.columns > 0
        self.stride = f.columns
        self.whole: Single | Decode | None = None
        self.project = self.product = self.fill = None
        if config.route == "single":
            self.whole = Single(f, config)
            return
        if config.route == "decode" and f.columns:
            self.whole = Decode(f, config)
            return
        pad = 0
        if config.route == "scratch":
            pad = -f.columns % CUBLAS_COLUMNS if f.columns else 0
            self.stride = f.k + f.columns + pad
            self.fill = Fill(f, beside=f.columns + pad)
        elif config.route == "dense":
            self.fill = Fill(f)
        if f.columns:
            self.project = Projection(
                f, plain=self.keep, copy=config.route == "scratch", pad=pad
            )  # fmt: skip
        if config.route != "scratch":
            self.product = Product(f, config, transposed=False)

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
            return self.whole(*given), None, None
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
                hidden = x.new_empty((f.m, f.columns))
                plain, made = self.project(
                    x, a, a_scales, gates, speakers, scaling, hidden, self.stride
                )
            if self.fill is not None:
                weight = self.fill.parts(weight, x)
            assert self.product is not None
            if f.columns:
                experts = (hidden, self.stride, b, b_scales, None, made)
                y = self.product(x, weight, bias, speakers, *experts)
            else:
                y = self.product(x, weight, bias, None)
        return y, plain if self.keep else None, made if self.keep and router else None


class BackwardPlan:
    """The backward of calls of one kind, for the gradients in `needs`: x, lora_a, lora_b, gates."""

    def __init__(self, facts: Facts, needs: tuple[bool, bool, bool, bool], kept: bool) -> None:
        """`kept` says that P and the gates are given, as the forward left them."""
        f = self.facts = facts
        need_x, need_a, need_b, need_gates = self.needs = needs
        config = f.config("backward")
        self.route = config.route
        routed = f.gating is not None
        self.through = need_gates or (routed and need_x)
        # Without gates at hand their router has to be asked again.
        self.again = None
        if f.columns and not kept and (need_b or self.through or routed):
            self.again = Projection(f, plain=True, copy=False, pad=0)
        self.columns = f.columns + (f.experts if routed else 0)
        widened = need_x and config.route == "scratch"
        pad = -self.columns % CUBLAS_COLUMNS if widened else 0
        self.stride = f.n + self.columns + pad if widened else self.columns
        self.fill = self.product = None
        if widened:
            self.fill = Fill(f, below=self.columns + pad if f.columns else 0)
        elif need_x:
            if config.route == "dense":
                self.fill = Fill(f)
            self.product = Product(f, config, transposed=True)
        self.narrow = None
        self.gradients = None
        if not f.columns:
            return
        self.m, self.people = Varying(f.m), Varying(max(1, f.speakers))
        self.inverse_temperature = f.inverse_temperature()
        of_router = routed and need_gates
        people = int(self.people)
        block_r = min(64, max(16, power_of_2(self.columns)))
        first = 0 if need_a else f.columns
        last = self.columns if of_router else f.columns
        count = tiles(last - first, block_r) * tiles(f.k, GRADIENT_TILE)
        if need_b:
            count += tiles(f.columns, block_r) * tiles(f.n, GRADIENT_TILE)
        # Each share holds the experts of every speaker.
        self.split = max(1, min(tiles(f.m, SHARE_TOKENS), 16 // people))
        self.counters = count * people if self.split > 1 else 0
        self.shares = count * people * self.split * block_r * GRADIENT_TILE
        if count:
            self.gradients = Launcher(
                "gradients", (count, self.split, people), 4, 3,
                A=need_a, B=need_b, ROUTER=of_router, SHARED=self.split > 1,
                SPEAKERS=f.speakers > 0, PRECISION=f.precision,
                BLOCK_R=block_r, BLOCK_O=GRADIENT_TILE, BLOCK_M=32 if f.exact else 64,
            )  # fmt: skip
        if need_x or need_a or self.through:
            together, block_m, block_r, block_d = narrow_tiles(f, True)
            tail = (f.experts if routed else 0) + pad
            # Gates and their gradients lie in registers beside the tile.
            large = block_m == 64 or (block_r >= 64 and f.float32_experts)
            self.narrow = Launcher(
                "project_backward", (tiles(f.m, block_m),), 8 if large else 4,
                2 if block_r > 64 else 3,
                ROUTER=routed, THROUGH=self.through, DGATES=need_gates and not routed,
                COPY=widened, TAIL=tail, SPEAKERS=f.speakers > 0, PRECISION=f.precision,
                TOGETHER=together, BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_D=block_d,
                BLOCK_E=max(16, power_of_2(f.experts + pad)),
            )  # fmt: skip

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
        need_x, need_a, need_b, need_gates = self.needs
        routed = f.gating is not None
        if not f.columns:
            dx = self._dx(dy, weight, dx_dtype) if need_x else None
            zeros = (torch.zeros_like(t) for t in (a, b, gates))
            da, db, dg = (z if n else None for z, n in zip(zeros, self.needs[1:], strict=True))
            return dx, da, db, dg
        if self.again is not None:
            hidden = x.new_empty((f.m, f.columns))
            plain, made = self.again(x, a, None, gates, speakers, scaling, hidden, f.columns)
        router = gates if routed else None
        row_gates = made if routed else gates
        small = wide = dgates = counters = dx = None
        if self.narrow is not None:
            if self.route == "scratch" and need_x:
                wide = dy.new_empty((f.m, self.stride))
                small = wide[:, f.n :]
            else:
                small = dy.new_empty((f.m, self.columns))
            counters = dy.new_empty(self.counters, dtype=torch.int32)
            if need_gates and not routed:
                shared = f.gates_span > 1
                kind = torch.float32 if shared else gates.dtype
                dgates = dy.new_empty((f.m, f.experts), dtype=kind)
            self.narrow(
                dy, b, row_gates, speakers, plain, small, dgates, wide, counters,
                self.m, f.n, f.experts, f.rank, self.people,
                self.stride, self.stride if wide is not None else 0,
                f.gates_span, f.speakers_span, scaling, self.inverse_temperature,
                Varying(self.counters), *f.b_strides,
            )  # fmt: skip
        elif self.counters:
            counters = torch.zeros(self.counters, dtype=torch.int32, device=dy.device)
        if need_x:
            dx = self._dx(dy, weight, dx_dtype, wide, small, a, router, speakers)
        da, db, dv = None, None, None
        if self.gradients is not None:
            da = torch.empty(a.shape, dtype=a.dtype, device=a.device) if need_a else None
            db = torch.empty(b.shape, dtype=b.dtype, device=b.device) if need_b else None
            dv = torch.empty_like(gates) if routed and need_gates else None
            shares = None
            if self.split > 1:
                shares = dy.new_empty(self.shares, dtype=torch.float32)
            self.gradients(
                small, x, plain, row_gates, dy, speakers, shares, counters, da, db, dv,
                self.m, f.k, f.n, f.experts, f.rank, self.people,
                Varying(self.split), self.stride, f.gates_span, f.speakers_span, scaling,
            )  # fmt: skip
        return dx, da, db, dv if routed else dgates

    def _dx(
        self,
        dy: Tensor,
        weight: WeightParts,
        dtype: torch.dtype | None,
        wide: Tensor | None = None,
        small: Tensor | None = None,
        a: Tensor | None = None,
        router: Tensor | None = None,
        speakers: Tensor | None = None,
    ) -> Tensor:
        """dX of dY, or of what stands beside it as well: [dY | dP | dZ], `wide` or in two."""
        if self.product is None:
            assert self.fill is not None
            rows = dy.view(self.facts.m, -1) if wide is None else wide
            dx = rows @ self.fill(weight, dy, a, None, router)
            return dx if dtype is None else dx.to(dtype)
        if self.fill is not None:
            weight = self.fill.parts(weight, dy)
        return self.product(
            dy, weight, None, speakers, small, self.stride, a, None, router, dtype=dtype
        )


forward_plan: Callable[[Facts, bool], ForwardPlan] = lru_cache(maxsize=2048)(ForwardPlan)
backward_plan: Callable[[Facts, tuple[bool, ...], bool], BackwardPlan] = lru_cache(maxsize=2048)(
    BackwardPlan
)
on_change(forward_plan.cache_clear)  # type: ignore[attr-defined]
on_change(backward_plan.cache_clear)  # type: ignore[attr-defined]
