"""The step that runs the whole forward in one launch; see kernels/single.py."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from saml_kernels.backends.triton.configs import Config, on_change
from saml_kernels.backends.triton.counters import counters
from saml_kernels.backends.triton.facts import (
    Facts,
    WeightParts,
    decoding_facts,
    power_of_2,
    tiles,
)
from saml_kernels.backends.triton.launcher import Launcher, interpreting
from saml_kernels.backends.triton.signature import Varying
from saml_kernels.backends.triton.steps import FLOAT32_TILE, spans_of

__all__ = ["MEMBERS", "Member", "Single", "together_plan"]

# Codes, scales, A, router, B and bias of a layer.
Member = tuple[Tensor | None, ...]
MEMBERS = 3  # that the kernel can take
NOBODY: tuple[None, ...] = (None,) * 6 * (MEMBERS - 1)

P_SHARES = 8  # of the reduction, at most: one program adds them up
EPILOGUE_ROWS = 16  # whose gates are made at once
# PTX; a load, so that waiting disturbs nobody.
ACQUIRE = "ld.acquire.gpu.global.b32 $0, [$1];"
ACQUIRES = "" if interpreting() or torch.version.hip is not None else ACQUIRE


def piece_columns(block_m: int) -> int:
    """Columns of [A ; router] or B that one program projects on; 16 is the least that can be."""
    return 16 if block_m <= 32 else 32


def piece_depth(block_m: int, block_d: int) -> int:
    """Of its tiles: A, router and x lie side by side in shared memory."""
    return min(block_d, 128 if block_m <= 32 else 64)


def piece_shares(f: Facts, rows: int, across: int, steps: int) -> int:
    """Shares of a projection's reduction: as many as give the device's processors work."""
    return max(1, min(P_SHARES, steps, tiles(f.traits[1], max(1, rows * across))))


class Single:
    """Base product, experts and bias of a few tokens; of several layers that read the same ones."""

    def __init__(self, facts: Facts, config: Config, members: int = 1, keep: bool = False) -> None:
        """Of up to `MEMBERS` layers with equal facts; one can `keep` P and its router's gates."""
        f = facts
        small = FLOAT32_TILE if f.exact else 256
        block_m, block_o, block_d = (
            min(b, small) for b in (config.block_m, config.block_o, config.block_d)
        )
        if f.k % f.block_size:
            block_d = min(block_d, f.block_size)  # element by element: larger tiles spill
        routed = f.gating is not None
        columns = f.columns + (f.experts if routed else 0)
        tiles_m, tiles_o = tiles(f.m, block_m), tiles(f.n, block_o)
        steps = tiles(f.k, block_d)
        shares = min(config.split, steps)
        block_pd = piece_depth(block_m, block_d)
        block_p = piece_columns(block_m)
        across = tiles(columns, block_p)
        # As many alone as together: the same bits.
        p_shares = piece_shares(f, tiles_m, across, tiles(f.k, block_pd))
        pieces = across * p_shares
        gating = f.gating_constants()
        kept = f.gating[0] if f.gating else f.experts
        block_r = min(64, max(16, power_of_2(max(1, f.columns))))
        if f.exact:
            block_r = min(block_r, 32)
        self.counters = 2 + members * tiles_m * (2 + (tiles_o if shares > 1 else 0))
        self.work = f.m * (p_shares * columns + f.columns + f.experts)
        self.work += shares * f.m * f.n if shares > 1 else 0
        self.work *= members
        programs = members * tiles_m * (pieces + tiles_o * shares)
        self.launch = Launcher(
            "single", (programs,), config.warps, config.stages,
            **decoding_facts(f, block_d, config.scale == "after"), PRECISION=f.precision,
            EXPERTS=f.columns > 0, A_EBLOCK=f.a_block, B_EBLOCK=f.b_block, ROUTER=routed,
            # Dense gates of a token router leave no expert out.
            SKIP=f.columns > 0 and kept is not None and f.experts > 1,
            SPEAKERS=f.speakers > 0 and f.columns > 0, BIAS=f.bias,
            ACQUIRE=ACQUIRES, MEMBERS=members, KEEP=keep, GROUP=config.group, **gating,
            BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_D=block_d, BLOCK_R=block_r, BLOCK_P=block_p,
            BLOCK_PD=block_pd, BLOCK_Q=EPILOGUE_ROWS,
        )  # fmt: skip
        sizes = (
            Varying(f.m), f.k, f.n, f.columns, f.experts, max(1, f.rank),
            Varying(max(1, f.speakers)), Varying(shares), Varying(p_shares),
            *spans_of(f),
        )  # fmt: skip
        strides = (*f.a_strides, *f.b_strides) if f.columns else (0,) * 8
        self.shape, self.routed, self.bare = (f.m, f.n), routed, not f.columns
        self.sizes, self.last = sizes, (f.inverse_temperature(), *strides)
        self.alone = (*NOBODY, *sizes)
        self.keep, self.experts = keep, f.experts
        self.columns = f.columns
        self.take = counters(f.device).take

    def __call__(
        self,
        x: Tensor,
        weight: WeightParts,
        a: Tensor | None,
        a_scales: Tensor | None,
        b: Tensor | None,
        b_scales: Tensor | None,
        gates: Tensor | None,
        bias: Tensor | None,
        speakers: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y [M, N]; P [M, R] and a router's gates [M, E] where they are kept."""
        router = None
        if self.bare:
            a = a_scales = b = b_scales = gates = speakers = None
        elif self.routed:
            router, gates = gates, None
        y = x.new_empty(self.shape)
        plain = made = None
        if self.keep:
            plain = x.new_empty((self.shape[0], self.columns), dtype=torch.float32)
            if self.routed:
                made = x.new_empty((self.shape[0], self.experts), dtype=torch.float32)
        work = x.new_empty(self.work, dtype=torch.float32)
        codes, scales, table = weight
        self.launch(
            x, y, work, self.take(self.counters), table, codes, scales,
            a, a_scales, router, b, b_scales, gates, bias, speakers, plain, made,
            *self.alone, scaling, *self.last,
        )  # fmt: skip
        return y, plain, made

    def together(
        self, x: Tensor, table: Tensor | None, members: list[Member], scaling: float
    ) -> Tensor:
        """y [members, M, N] of layers with token routers or without experts."""
        if self.bare:
            members = [
                (codes, scales, None, None, None, bias) for codes, scales, *_, bias in members
            ]
        (codes, scales, a, router, b, bias), *others = members
        y = x.new_empty((len(members), *self.shape))
        work = x.new_empty(self.work, dtype=torch.float32)
        rest = [part for member in others for part in member]
        self.launch(
            x, y, work, self.take(self.counters), table, codes, scales,
            a, None, router, b, None, None, bias, None, None, None,
            *rest, *NOBODY[len(rest) :], *self.sizes, scaling, *self.last,
        )  # fmt: skip
        return y


@lru_cache(maxsize=256)
def together_plan(facts: Facts, members: int) -> Single:
    """The call of so many layers whose facts are these."""
    return Single(facts, facts.config("forward"), members)


on_change(together_plan.cache_clear)
