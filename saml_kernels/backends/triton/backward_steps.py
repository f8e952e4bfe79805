"""The parts of a backward: what comes back to x and the gates, and the experts' own gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from saml_kernels.backends.triton.configs import Config
from saml_kernels.backends.triton.counters import counters
from saml_kernels.backends.triton.facts import (
    DENSE,
    Facts,
    WeightParts,
    decoding_facts,
    power_of_2,
    tiles,
)
from saml_kernels.backends.triton.launcher import Launcher
from saml_kernels.backends.triton.signature import Varying
from saml_kernels.backends.triton.single import (
    ACQUIRES,
    EPILOGUE_ROWS,
    piece_columns,
    piece_depth,
    piece_shares,
)
from saml_kernels.backends.triton.steps import product_tiles, spans_of

__all__ = ["ExpertGradients", "Finish", "OneLaunch"]

GRADIENT_TILE = 64
GRADIENT_TOKENS = 128  # of a share of the reduction over tokens, at least
MOST_SHARES = 16  # each holds the experts of every speaker


def _tail(f: Facts) -> int:
    """Columns that follow dP: dZ, where there is a router."""
    return f.experts if f.gating is not None else 0


class OneLaunch:
    """dX, [dP | dZ] and the gates' gradient by `backward_kernel`."""

    def __init__(self, facts: Facts, config: Config, *, dx: bool, through: bool) -> None:
        """`dx` says that dX is wanted, `through` that the gates' gradient is, if only for dZ."""
        f = self.facts = facts
        block_m, block_o, block_d, warps = product_tiles(f, config)
        decoding = DENSE
        if config.route != "dense":
            block_o = min(block_o, f.block_size)
            decoding = decoding_facts(f, block_o)
        routed = f.gating is not None and f.columns > 0
        self.columns = f.columns + (_tail(f) if routed else 0)
        rows, steps = tiles(f.m, block_m), tiles(f.n, block_d)
        across = tiles(f.k, block_o) if dx else 0
        shares = min(config.split, steps)
        block_p, block_pd = piece_columns(block_m), piece_depth(block_m, block_d)
        p_shares = piece_shares(f, rows, tiles(f.columns, block_p), tiles(f.n, block_pd))
        pieces = tiles(f.columns, block_p) * p_shares
        self.through, self.given = through, f.gating is None
        self.counters = 2 + 2 * rows + (rows * across if shares > 1 else 0)
        self.work = f.m * p_shares * f.columns + (shares * f.m * f.k if dx and shares > 1 else 0)
        self.launch = Launcher(
            "backward", (rows * (pieces + across * shares),), warps, config.stages,
            **decoding, PRECISION=f.precision, EXPERTS=f.columns > 0, ROUTER=routed,
            THROUGH=through, DGATES=through and self.given, DX=dx,
            SPEAKERS=f.speakers > 0 and f.columns > 0, ACQUIRE=ACQUIRES, GROUP=config.group,
            BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_D=block_d,
            BLOCK_R=min(16 if f.exact else 64, max(16, power_of_2(max(1, f.columns)))),
            BLOCK_P=block_p, BLOCK_PD=block_pd,
            BLOCK_Q=EPILOGUE_ROWS,
            BLOCK_E=f.gating_constants()["BLOCK_E"],
        )  # fmt: skip
        strides = (*f.b_strides, *f.a_strides) if f.columns else (0,) * 8
        self.sizes = (
            Varying(f.m), f.n, f.k, f.columns, f.experts, max(1, f.rank),
            Varying(max(1, f.speakers)), Varying(shares), Varying(p_shares),
            *spans_of(f),
        )  # fmt: skip
        self.last = (f.inverse_temperature(), *strides)
        self.dx = dx
        self.take = counters(f.device).take

    def __call__(
        self,
        dy: Tensor,
        weight: WeightParts,
        b: Tensor | None,
        a: Tensor | None,
        router: Tensor | None,
        gates: Tensor | None,
        plain: Tensor | None,
        speakers: Tensor | None,
        scaling: float,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dX [M, K] in `dtype` or None; [dP | dZ] [M, R (+ E)]; the given gates' gradient."""
        f = self.facts
        dx = dy.new_empty((f.m, f.k), dtype=dtype or dy.dtype) if self.dx else None
        small = dy.new_empty((f.m, self.columns)) if f.columns else None
        dgates = _gradient_of_gates(f, dy, gates) if self.through and self.given else None
        work = dy.new_empty(self.work, dtype=torch.float32)
        codes, scales, table = weight
        self.launch(
            dy, dx, work, self.take(self.counters), table, codes, scales, b, a, router,
            gates, plain if self.through else None, speakers, small, dgates,
            *self.sizes, scaling, *self.last,
        )  # fmt: skip
        return dx, small, dgates


class Finish:
    """The same from [dY W | dY B], which cuBLAS has made, by `finish_backward_kernel`."""

    def __init__(self, facts: Facts, stride: int, through: bool) -> None:
        """Rows are `stride` apart; `through` as above."""
        f = self.facts = facts
        routed = f.gating is not None
        self.columns = f.columns + _tail(f)
        self.through, self.given = through, not routed
        block_m, block_o, warps = (16, 32, 4) if f.exact else (64, 128, 8)
        self.launch = Launcher(
            "finish_backward", (tiles(f.k, block_o), tiles(f.m, block_m)), warps, 1,
            ROUTER=routed, THROUGH=through, DGATES=through and not routed, PRECISION=f.precision,
            BLOCK_M=block_m, BLOCK_O=block_o,
            # Wider ones leave room for one program on a processor.
            BLOCK_R=min(16 if f.exact else 32, max(16, power_of_2(f.columns))),
            BLOCK_E=f.gating_constants()["BLOCK_E"],
        )  # fmt: skip
        self.sizes = (Varying(f.m), f.k, f.experts, f.rank, stride, spans_of(f)[0])
        self.last = (f.inverse_temperature(), *f.a_strides[1:])

    def __call__(
        self,
        wide: Tensor,
        a: Tensor,
        router: Tensor | None,
        gates: Tensor,
        plain: Tensor | None,
        scaling: float,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `OneLaunch`."""
        f = self.facts
        dx = wide.new_empty((f.m, f.k), dtype=dtype or wide.dtype)
        small = wide.new_empty((f.m, self.columns))
        dgates = _gradient_of_gates(f, wide, gates) if self.through and self.given else None
        self.launch(
            wide, dx, a, router, gates, plain if self.through else None, small, dgates,
            *self.sizes, scaling, *self.last,
        )  # fmt: skip
        return dx, small, dgates


def _gradient_of_gates(f: Facts, dy: Tensor, gates: Tensor | None) -> Tensor:
    """Room for it, a row for each token; float32 where rows that share gates are to be added."""
    assert gates is not None
    kind = torch.float32 if f.gates_span > 1 else gates.dtype
    return dy.new_empty((f.m, f.experts), dtype=kind)


class ExpertGradients:
    """dA, dB and the router's gradient by `gradients_kernel`."""

    def __init__(self, facts: Facts, need_a: bool, need_b: bool, of_router: bool) -> None:
        """Of those that are needed, one at least."""
        f = self.facts = facts
        self.needs = (need_a, need_b, of_router)
        people = max(1, f.speakers)
        self.stride = f.columns + _tail(f)
        block_r = min(64, max(16, power_of_2(self.stride)))
        first = 0 if need_a else f.columns
        last = self.stride if of_router else f.columns
        count = tiles(last - first, block_r) * tiles(f.k, GRADIENT_TILE)
        if need_b:
            count += tiles(f.columns, block_r) * tiles(f.n, GRADIENT_TILE)
        fill = tiles(2 * f.traits[1], count * people)
        most = MOST_SHARES // people
        self.split = max(1, min(tiles(f.m, GRADIENT_TOKENS), fill, most))
        shared = self.split > 1
        self.counters = count * people if shared else 0
        self.shares = count * people * self.split * block_r * GRADIENT_TILE if shared else 0
        self.launch = Launcher(
            "gradients", (count, self.split, people), 4, 3,
            A=need_a, B=need_b, ROUTER=of_router, SHARED=shared,
            SPEAKERS=f.speakers > 0, PRECISION=f.precision,
            BLOCK_R=block_r, BLOCK_O=GRADIENT_TILE, BLOCK_M=32 if f.exact else 64,
        )  # fmt: skip
        self.sizes = (
            Varying(f.m), f.k, f.n, f.experts, f.rank, Varying(people), Varying(self.split),
            self.stride, *spans_of(f),
        )  # fmt: skip
        self.take = counters(f.device).take

    def __call__(
        self,
        small: Tensor | None,
        x: Tensor,
        plain: Tensor | None,
        row_gates: Tensor,
        dy: Tensor,
        speakers: Tensor | None,
        a: Tensor,
        b: Tensor,
        router: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dA, dB, dV as their parameters lie, None where they are not needed."""
        need_a, need_b, of_router = self.needs
        da = torch.empty(a.shape, dtype=a.dtype, device=a.device) if need_a else None
        db = torch.empty(b.shape, dtype=b.dtype, device=b.device) if need_b else None
        dv = torch.empty_like(router) if of_router and router is not None else None
        shares = count = None
        if self.counters:
            shares = dy.new_empty(self.shares, dtype=torch.float32)
            count = self.take(self.counters)
        self.launch(
            small, x, plain if need_b else None, row_gates if need_b else None, dy, speakers,
            shares, count, da, db, dv, *self.sizes, scaling,
        )  # fmt: skip
        return da, db, dv
