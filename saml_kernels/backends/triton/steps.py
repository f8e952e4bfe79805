"""The parts that plans are made of: each chooses tiles for its kernels and starts them."""

from __future__ import annotations

import torch
from torch import Tensor

from saml_kernels.backends.triton.configs import Config, from_hopper
from saml_kernels.backends.triton.facts import (
    DENSE,
    Facts,
    WeightParts,
    decoding_facts,
    power_of_2,
    tiles,
)
from saml_kernels.backends.triton.launcher import Launcher, interpreting
from saml_kernels.backends.triton.signature import Varying

__all__ = [
    "FLOAT32_TILE",
    "Decode",
    "Fill",
    "Finish",
    "Persistent",
    "Product",
    "Projection",
    "product_tiles",
    "spans_of",
]

FLOAT32_TILE = 32  # exact float32 products go through ordinary registers: larger tiles spill
MIXED_ROWS = 64  # rows of many speakers keep masks beside the tile: larger ones spill


def product_tiles(facts: Facts, config: Config) -> tuple[int, int, int, int]:
    """`block_m`, `block_o`, `block_d` and warps of a product that experts add to."""
    f, warps = facts, config.warps
    block_m, block_o, block_d = config.block_m, config.block_o, config.block_d
    if f.exact:
        block_m, block_o, block_d = (min(b, FLOAT32_TILE) for b in (block_m, block_o, block_d))
    if f.speakers and f.columns:
        if block_m > MIXED_ROWS:
            block_m, warps = MIXED_ROWS, 4
        if f.exact:
            block_m = 16
    return block_m, block_o, block_d, warps


def spans_of(facts: Facts) -> tuple[int, int]:
    """Of gates and speakers, as kernels take them: built for 1, where nothing is divided, or any.

    Whoever adds an argument for one has the kernel specialised on 1, but on no alignment.
    """
    gates, speakers = (n if n == 1 else Varying(n) for n in (facts.gates_span, facts.speakers_span))
    return gates, speakers


class Product:
    """x W^T + hidden B^T + bias."""

    def __init__(self, facts: Facts, config: Config) -> None:
        f = self.facts = facts
        self.split = config.split
        block_m, block_o, along, warps = product_tiles(f, config)
        decoding = DENSE
        if config.route != "dense":
            along = min(along, f.block_size)
            decoding = decoding_facts(f, along, config.scale == "after")
        r = f.columns
        strides = f.b_strides if r else (0, 0, 0, 0)
        kept = f.gating[0] if f.gating else f.experts
        count = tiles(f.m, block_m) * tiles(f.n, block_o)
        self.launch = Launcher(
            "product", (count, self.split), warps, config.stages,
            **decoding, PRECISION=f.precision, EXPERTS=r > 0, EBLOCK=f.b_block,
            # Dense gates of a token router leave no expert out.
            SKIP=r > 0 and kept is not None and f.experts > 1,
            SPEAKERS=f.speakers > 0 and r > 0, BIAS=f.bias and self.split == 1,
            BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_D=along,
            BLOCK_R=min(16 if f.exact else 64, max(16, power_of_2(max(1, r)))),
            BLOCK_E=f.gating_constants()["BLOCK_E"], GROUP=config.group,
        )  # fmt: skip
        self.sizes = (
            Varying(f.m), f.k, f.n, f.columns, f.experts, max(1, f.rank),
            Varying(max(1, f.speakers)), Varying(self.split),
        )  # fmt: skip
        self.rest = (*spans_of(f), *strides)
        self.reduce = None
        if self.split > 1:
            self.reduce = Launcher(
                "reduce", (tiles(f.m * f.n, 1024),), 4, 1, BIAS=f.bias, BLOCK=1024
            )

    def __call__(
        self,
        x: Tensor,
        weight: WeightParts,
        bias: Tensor | None,
        speakers: Tensor | None,
        hidden: Tensor | None = None,
        experts: Tensor | None = None,
        scales: Tensor | None = None,
        gates: Tensor | None = None,
    ) -> Tensor:
        """[M, N] of x [M, K] and `hidden` [M, R]."""
        f, split = self.facts, self.split
        y = x.new_empty((f.m, f.n))
        partial = y if split == 1 else x.new_empty((split, f.m, f.n), dtype=torch.float32)
        self.launch(
            x, partial, *weight, hidden, experts, scales, gates, bias, speakers,
            *self.sizes, f.columns, *self.rest,
        )  # fmt: skip
        if self.reduce is not None:
            self.reduce(partial, y, bias, self.sizes[0], f.n, self.sizes[-1])
        return y


class Persistent:
    """The same of one speaker, on [W | B] as `Fill` leaves it, by tensor descriptors."""

    def __init__(self, facts: Facts, config: Config, columns: int) -> None:
        """`columns` of H and of B, those that are zero among them."""
        f = self.facts = facts
        capability, processors, _ = f.traits
        # Triton (3.6, 3.9) cannot make one loop of two whose sums lie in tensor memory: there a
        # second program of a processor works while the first one stores.
        flat = not capability.startswith(("sm_10", "sm_11"))
        count = tiles(f.m, config.block_m) * tiles(f.n, config.block_o)
        self.launch = Launcher(
            "persistent", (min(count, processors if flat else 2 * processors),),
            config.warps, config.stages, C=columns, BIAS=f.bias, PRECISION=f.precision,
            BLOCK_M=config.block_m, BLOCK_O=config.block_o, BLOCK_D=config.block_d,
            BLOCK_C=max(16, power_of_2(columns)), GROUP=config.group, FLAT=flat,
        )  # fmt: skip
        self.sizes = (Varying(f.m), f.k, f.n)

    def __call__(
        self, x: Tensor, weight: WeightParts, bias: Tensor | None, hidden: Tensor | None
    ) -> Tensor:
        """[M, N] of x [M, K] and `hidden` [M, columns]."""
        y = x.new_empty((self.facts.m, self.facts.n))
        self.launch(x, y, weight[0], hidden, bias, *self.sizes)
        return y


class Projection:
    """P = x A^T, gated to H: one pass over x, which makes a token router's gates as well."""

    def __init__(self, facts: Facts, *, plain: bool, copy: bool, pad: int) -> None:
        f = self.facts = facts
        together, block_m, block_r, block_d = _narrow_tiles(f, f.gating is not None)
        self.plain = plain
        self.launch = Launcher(
            "project", (tiles(f.m, block_m), tiles(f.experts, together)), 4,
            2 if block_r > 64 else 3,
            EBLOCK=f.a_block, ROUTER=f.gating is not None, **f.gating_constants(),
            SKIP=f.m <= 16 and not plain and f.gating is None,
            PLAIN=plain, COPY=copy, PAD=pad, SPEAKERS=f.speakers > 0, PRECISION=f.precision,
            TOGETHER=together, BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_D=block_d,
        )  # fmt: skip
        self.sizes = (Varying(f.m), f.k, f.experts, f.rank, Varying(max(1, f.speakers)))
        self.spans = spans_of(f)
        self.inverse_temperature = f.inverse_temperature()

    def __call__(
        self,
        x: Tensor,
        a: Tensor,
        scales: Tensor | None,
        gates: Tensor,
        speakers: Tensor | None,
        scaling: float,
        gated: Tensor,
        stride: int,
        wide: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Fill `gated` (rows `stride` apart; and `wide` with x): P or None, and the gates."""
        f = self.facts
        router = None
        if f.gating is not None:
            router, gates = gates, x.new_empty((f.m, f.experts), dtype=torch.float32)
        plain = x.new_empty((f.m, f.columns), dtype=torch.float32) if self.plain else None
        self.launch(
            x, a, scales, router, gates, speakers, plain, gated, wide,
            *self.sizes, stride, stride if wide is not None else 0, *self.spans,
            scaling, self.inverse_temperature, *f.a_strides,
        )  # fmt: skip
        return plain, gates


class Decode:
    """The whole forward in two launches, for a few tokens."""

    def __init__(self, facts: Facts, config: Config) -> None:
        f = self.facts = facts
        self.split = config.split
        self.m = Varying(f.m)
        self.sizes = (
            f.columns, f.experts, f.rank, Varying(max(1, f.speakers)), Varying(self.split),
            *spans_of(f),
        )  # fmt: skip
        routed = f.gating is not None
        self.all_columns = f.columns + (f.experts if routed else 0)
        small = FLOAT32_TILE if f.exact else 256
        block_m, block_o = min(config.block_m, small), min(config.block_o, small)
        block_d = min(config.block_d, small, f.block_size)
        block_r = min(64, max(16, power_of_2(self.all_columns)))
        count = tiles(self.all_columns, block_r) + tiles(f.n, block_o)
        # Tiles of experts are as wide as they lie until they are multiplied.
        large = block_r == 64 and (f.float32_experts or f.speakers > 0)
        stages = min(config.stages, 3) if block_r == 64 and f.float32_experts else config.stages
        warps = 8 if block_m >= 64 and large else config.warps
        dependent = config.dependent and not interpreting() and from_hopper(f.traits[0])
        self.partial = Launcher(
            "partial", (count, self.split, tiles(f.m, block_m)), warps, stages,
            **decoding_facts(f, block_d, config.scale == "after"), EBLOCK=f.a_block,
            ROUTER=routed, SPEAKERS=f.speakers > 0, PRECISION=f.precision,
            BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_D=block_d, BLOCK_R=block_r,
            BLOCK_E=f.gating_constants()["BLOCK_E"], TRIGGERS=dependent,
        )  # fmt: skip
        self.finish = Finish(
            f, config, split=self.split, base_stride=f.n, stride=self.all_columns, keep=False,
            dependent=dependent,
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
        """y [M, N]; nothing is kept."""
        f, split = self.facts, self.split
        router, given = (gates, None) if f.gating is not None else (None, gates)
        base = x.new_empty((split, f.m, f.n), dtype=torch.float32)
        projected = x.new_empty((split, f.m, self.all_columns), dtype=torch.float32)
        self.partial(
            x, base, projected, *weight, a, a_scales, router, given, speakers,
            self.m, f.k, f.n, *self.sizes, *f.a_strides,
        )  # fmt: skip
        return self.finish(base, projected, b, b_scales, given, bias, speakers, scaling, x.dtype)


class Finish:
    """Gates, experts and bias on top of shares of X W^T and of X [A ; router]^T."""

    def __init__(
        self,
        facts: Facts,
        config: Config,
        *,
        split: int,
        base_stride: int,
        stride: int,
        keep: bool,
        dependent: bool = False,
    ) -> None:
        """Rows of the shares are `base_stride` and `stride` apart; `keep` as in `ForwardPlan`.

        A `dependent` launch starts while the kernel before it runs, which must say when.
        """
        f = self.facts = facts
        self.keep, self.routed = keep, f.gating is not None
        block_m, block_o, _, warps = product_tiles(f, config)
        # Beside large tiles wider ones would not fit the registers.
        widest = 32 if block_m >= 64 and block_o >= 128 else 64
        block_r = min(widest, max(16, power_of_2(f.columns)))
        if block_m >= 64 and block_r == 64:
            warps = 8  # with fewer the tiles do not fit the registers
        elif f.speakers and (block_m == 16 or (block_m == 32 and block_r < 64)):
            warps = 2
        self.launch = Launcher(
            "finish", (tiles(f.n, block_o), tiles(f.m, block_m)), warps, 1,
            ROUTER=self.routed, SPEAKERS=f.speakers > 0, PRECISION=f.precision, KEEP=keep,
            **f.gating_constants(), EBLOCK=f.b_block, BIAS=f.bias, BLOCK_M=block_m,
            BLOCK_O=block_o, BLOCK_R=block_r, WAITS=dependent,
        )  # fmt: skip
        self.sizes = (
            Varying(f.m), f.n, f.columns, f.experts, f.rank, Varying(max(1, f.speakers)),
            Varying(split), base_stride, stride, *spans_of(f),
        )  # fmt: skip
        self.last = (f.inverse_temperature(), *f.b_strides)

    def __call__(
        self,
        base: Tensor,
        projected: Tensor,
        b: Tensor,
        b_scales: Tensor | None,
        gates: Tensor | None,
        bias: Tensor | None,
        speakers: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y [M, N]; P [M, R] and a router's gates [M, E] where they are kept."""
        f = self.facts
        y = base.new_empty((f.m, f.n), dtype=dtype)
        plain = made = None
        if self.keep:
            plain = base.new_empty((f.m, f.columns), dtype=torch.float32)
            if self.routed:
                made = base.new_empty((f.m, f.experts), dtype=torch.float32)
        self.launch(
            base, projected, y, b, b_scales, gates, bias, speakers, plain, made,
            *self.sizes, scaling, *self.last,
        )  # fmt: skip
        return y, plain, made


class Fill:
    """The weight dequantised to scratch: W, or more for a product with the experts by cuBLAS.

    [W | B] with `beside` columns more, or [W ; A], and a token router below A, with `below` rows.
    """

    def __init__(self, facts: Facts, *, beside: int = 0, below: int = 0) -> None:
        f = facts
        self.shape = (f.n + below, f.k + beside)
        block_k = min(64, f.block_size)
        decoding = decoding_facts(f, block_k)
        del decoding["AFTER"]  # nothing is multiplied here
        strides, block = (0, 0, 0), 0
        if beside:
            strides, block = f.b_strides[1:], f.b_block
        elif below:
            strides, block = f.a_strides[1:], f.a_block
        self.sizes = (f.n, f.k, f.columns, f.experts, max(1, f.rank), self.shape[1], *strides)
        grid = tiles(f.n, 32) + tiles(below, 32), tiles(f.k, block_k) + tiles(beside, block_k)
        self.launch = Launcher(
            "dequantize", grid, 4, 1,
            **decoding, BESIDE=beside, BELOW=below, ROUTER=below > 0 and f.gating is not None,
            EBLOCK=block, BLOCK_N=32, BLOCK_K=block_k,
        )  # fmt: skip

    def __call__(
        self,
        weight: WeightParts,
        like: Tensor,
        experts: Tensor | None = None,
        scales: Tensor | None = None,
        router: Tensor | None = None,
    ) -> Tensor:
        """The scratch, in the dtype of `like`.

        It is a block of PyTorch's caching allocator: every layer and call of a stream gets the
        same one, and nothing keeps it.
        """
        out = like.new_empty(self.shape)
        self.launch(*weight, out, experts, scales, router, *self.sizes)
        return out

    def parts(self, weight: WeightParts, like: Tensor, *experts: Tensor | None) -> WeightParts:
        """The scratch as a product takes a weight: no scales, no tables."""
        return self(weight, like, *experts), None, None


def _narrow_tiles(f: Facts, gates: bool) -> tuple[int, int, int, int]:
    """Experts together, rows, columns and depth of a tile that projects on the experts.

    `gates` says that they are made beside it.
    """
    together = min(f.experts, max(1, 64 // f.rank))
    block_r = max(16, power_of_2(together * f.rank))
    block_m = 16 if block_r > 128 else _tile_rows(f.m, f.traits[1])
    block_d = 64  # at 128 some of its kernels do not fit the registers (sm_87)
    if f.exact and (gates or f.speakers):
        block_m, block_d = 16, FLOAT32_TILE
    return together, block_m, block_r, block_d


def _tile_rows(m: int, processors: int) -> int:
    """Rows of a program that goes through whole rows of X: as many as leave no processor idle."""
    return next((rows for rows in (64, 32) if m >= rows * processors), 16)
