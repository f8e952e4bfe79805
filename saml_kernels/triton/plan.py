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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_kernels.codes import code_table, nested_code
from saml_kernels.quant import QuantizedTensor
from saml_kernels.reference import Gating, Gradients
from saml_kernels.triton.configs import Config, choose
from saml_kernels.triton.dispatch import Launcher, interpreting, on_change
from saml_kernels.triton.lookup import lookup_ptx
from saml_kernels.triton.signature import Varying

__all__ = [
    "BackwardPlan",
    "Facts",
    "Fill",
    "ForwardPlan",
    "backward_plan",
    "forward_plan",
    "weight_parts",
]

BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8}
FLOAT32_TILE = 32  # exact float32 products go through ordinary registers: larger tiles spill
MIXED_ROWS = 64  # rows of many speakers keep masks beside the tile: larger ones spill
SHARE_TOKENS = 1024  # a share of the reduction over tokens, in dA and dB
GRADIENT_TILE = 64
A_KIND = 6  # where `Facts.kinds` has lora_a, after the parts of the weight
CUBLAS_COLUMNS = 8  # widened operands are padded to this: else cuBLAS leaves its aligned kernels

Strides = tuple[int, int, int, int]  # of speaker, expert, direction within the expert, feature
WeightParts = tuple[Tensor | None, ...]


class Facts(NamedTuple):
    """What a call's launches depend on.

    Attributes:
        m, n, k: rows, out-features, in-features.
        dtype: of x and of the result.
        format, block_size, nested: of the weight.
        experts, rank: E, r; either may be 0.
        speakers: S, or 0 where there is no speaker index.
        a_strides, b_strides: of lora_a and lora_b, in elements.
        a_block, b_block: of int8 experts, elements that share a scale; 0 for others.
        gating: of a token router, or None where gates are given.
        gates_span, speakers_span: rows that share a row of gates, or an entry of the index.
        bias: whether there is one.
        precision: of float32 products; see `dispatch.precision`.
        device, traits: see `configs.device_traits`.
        kinds: dtypes and alignments of the tensors given, which kernels are specialised on.
        route: overrides the tuning tables.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    format: str
    block_size: int
    nested: bool
    experts: int
    rank: int
    speakers: int
    a_strides: Strides
    b_strides: Strides
    a_block: int
    b_block: int
    gating: Gating | None
    gates_span: int
    speakers_span: int
    bias: bool
    precision: str
    device: torch.device
    traits: tuple[str, int, str]
    kinds: tuple[Any, ...]
    route: str | Config | None = None

    @property
    def columns(self) -> int:
        """R = E r."""
        return self.experts * self.rank

    @property
    def exact(self) -> bool:
        """Whether products are those of float32."""
        return self.dtype == torch.float32

    @property
    def float32_experts(self) -> bool:
        """Whether half-precision tokens meet experts in float32."""
        kind = self.kinds[A_KIND]
        return not self.exact and kind is not None and kind[0] == torch.float32

    def config(self, direction: str) -> Config:
        """Route and tiles of "forward" or "backward"."""
        route = self.route
        if isinstance(route, Config):
            config = route
        else:
            config = choose(direction, self.m, self.n, self.k, *self.traits)
            if route is not None:
                split = config.split if route in ("decode", "split") else 1
                config = replace(config, route=route, split=split)
        if self.speakers and config.route == "scratch":
            # [W | B] has room for one speaker's experts.
            config = replace(config, route="dense")
        return config

    def gating_constants(self) -> dict[str, Any]:
        """Compile-time facts of the gates."""
        top_k = self.gating[0] if self.gating else None
        kept = top_k if top_k is not None and top_k < self.experts else 0
        return {"TOP_K": kept, "BLOCK_E": max(16, _power_of_2(self.experts))}

    def inverse_temperature(self) -> float:
        """What the router's logits are multiplied by."""
        return 1.0 / self.gating[1] if self.gating else 1.0


def weight_parts(weight: QuantizedTensor) -> WeightParts:
    """What kernels are given of a weight: codes, scales, and the tables that decode both."""
    nested = weight.nested_absmax is not None
    return (
        weight.codes,
        weight.absmax,
        weight.nested_absmax,
        nested_code(weight.device) if nested else None,
        weight.offset,
        code_table(weight.format, weight.device) if BITS[weight.format] == 4 else None,
    )


def _decoding(facts: Facts, along: int, after: bool = False) -> dict[str, Any]:
    """Compile-time facts of the quantised weight, for tiles `along` wide along its rows.

    `after` asks for scales after the product, which AFTER grants where blocks and tiles allow it.
    """
    bits = BITS[facts.format]
    aligned = facts.k % facts.block_size == 0 and facts.block_size % along == 0
    after = after and aligned
    # Scaled before, a code in float16 is as good as in bfloat16 and better.
    value = facts.dtype if after or facts.exact else torch.float16
    permutes = bits == 4 and not interpreting() and torch.version.hip is None
    ptx = lookup_ptx(facts.format, str(value).removeprefix("torch.")) if permutes else ""
    return {
        "BITS": bits, "QBLOCK": facts.block_size, "NESTED": facts.nested,
        "ALIGNED": aligned, "AFTER": after, "PTX": ptx,
    }  # fmt: skip


_DENSE = {"BITS": 16, "QBLOCK": 0, "NESTED": False, "ALIGNED": False, "AFTER": False, "PTX": ""}


class _Product:
    """x W^T (dy W, transposed) + hidden times the experts + bias."""

    def __init__(self, facts: Facts, config: Config, *, transposed: bool) -> None:
        f = self.facts = facts
        self.transposed, self.split = transposed, config.split
        self.d, self.out = (f.n, f.k) if transposed else (f.k, f.n)
        block_m, block_o, block_d = config.block_m, config.block_o, config.block_d
        if f.exact:
            block_m, block_o, block_d = (min(b, FLOAT32_TILE) for b in (block_m, block_o, block_d))
        warps = config.warps
        if f.speakers and f.columns:
            if block_m > MIXED_ROWS:
                block_m, warps = MIXED_ROWS, 4
            if f.exact:
                block_m = 16
        along = block_o if transposed else block_d
        decoding = _DENSE
        if config.route != "dense":
            along = min(along, f.block_size)
            decoding = _decoding(f, along, config.scale == "after" and not transposed)
        block_o, block_d = (along, block_d) if transposed else (block_o, along)
        r = f.columns
        strides = (f.a_strides if transposed else f.b_strides) if r else (0, 0, 0, 0)
        kept = f.gating[0] if f.gating else f.experts
        bias = f.bias and not transposed
        tiles = _tiles(f.m, block_m) * _tiles(self.out, block_o)
        self.launch = Launcher(
            "product", (tiles, self.split), warps, config.stages,
            TRANSPOSED=transposed, **decoding, PRECISION=f.precision,
            EXPERTS=r > 0, EBLOCK=0 if transposed else f.b_block,
            ROUTER=transposed and f.gating is not None and r > 0,
            # Dense gates of a token router leave no expert out.
            SKIP=not transposed and r > 0 and kept is not None and f.experts > 1,
            SPEAKERS=f.speakers > 0 and r > 0, BIAS=bias and self.split == 1,
            BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_D=block_d,
            BLOCK_R=min(16 if f.exact else 64, max(16, _power_of_2(max(1, r)))),
            BLOCK_E=f.gating_constants()["BLOCK_E"], GROUP=config.group,
        )  # fmt: skip
        self.sizes = (
            Varying(f.m), self.d, self.out, f.k, f.columns, f.experts, max(1, f.rank),
            Varying(max(1, f.speakers)), Varying(self.split),
        )  # fmt: skip
        self.rest = (f.gates_span, f.speakers_span, *strides)
        self.reduce = None
        if self.split > 1:
            self.reduce = Launcher(
                "reduce", (_tiles(f.m * self.out, 1024),), 4, 1, BIAS=bias, BLOCK=1024
            )

    def __call__(
        self,
        x: Tensor,
        weight: WeightParts,
        bias: Tensor | None,
        speakers: Tensor | None,
        hidden: Tensor | None = None,
        stride: int = 0,
        experts: Tensor | None = None,
        scales: Tensor | None = None,
        router: Tensor | None = None,
        gates: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """[M, O] in `dtype` (default: of x) of x [M, D]; rows of `hidden` are `stride` apart."""
        f, split = self.facts, self.split
        y = x.new_empty((f.m, self.out), dtype=dtype or x.dtype)
        partial = y if split == 1 else x.new_empty((split, f.m, self.out), dtype=torch.float32)
        self.launch(
            x, partial, *weight, hidden, experts, scales, router, gates, bias, speakers,
            *self.sizes, stride, *self.rest,
        )  # fmt: skip
        if self.reduce is not None:
            self.reduce(partial, y, bias, self.sizes[0], self.out, self.sizes[-1])
        return y


class _Projection:
    """P = x A^T, gated to H: one pass over x, which makes a token router's gates as well."""

    def __init__(self, facts: Facts, *, plain: bool, copy: bool, pad: int) -> None:
        f = self.facts = facts
        together, block_m, block_r, block_d = _narrow_tiles(f, f.gating is not None)
        self.copy, self.plain = copy, plain
        self.launch = Launcher(
            "project", (_tiles(f.m, block_m), _tiles(f.experts, together)), 4,
            2 if block_r > 64 else 3,
            EBLOCK=f.a_block, ROUTER=f.gating is not None, **f.gating_constants(),
            SKIP=f.m <= 16 and not plain and f.gating is None,
            PLAIN=plain, COPY=copy, PAD=pad, SPEAKERS=f.speakers > 0, PRECISION=f.precision,
            TOGETHER=together, BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_D=block_d,
        )  # fmt: skip
        self.sizes = (Varying(f.m), f.k, f.experts, f.rank, Varying(max(1, f.speakers)))
        self.spans = (f.gates_span, f.speakers_span)
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


class _Decode:
    """The whole forward in two launches, for a few tokens."""

    def __init__(self, facts: Facts, config: Config) -> None:
        f = self.facts = facts
        self.split = config.split
        self.m, self.inverse_temperature = Varying(f.m), f.inverse_temperature()
        self.sizes = (
            f.columns, f.experts, f.rank, Varying(max(1, f.speakers)), Varying(self.split),
            f.gates_span, f.speakers_span,
        )  # fmt: skip
        routed = f.gating is not None
        self.all_columns = f.columns + (f.experts if routed else 0)
        small = FLOAT32_TILE if f.exact else 256
        block_m, block_o = min(config.block_m, small), min(config.block_o, small)
        block_d = min(config.block_d, small, f.block_size)
        block_r = min(64, max(16, _power_of_2(self.all_columns)))
        gating = f.gating_constants()
        common = {"ROUTER": routed, "SPEAKERS": f.speakers > 0, "PRECISION": f.precision}
        tiles = _tiles(self.all_columns, block_r) + _tiles(f.n, block_o)
        # Tiles of experts are as wide as they lie until they are multiplied.
        large = block_r == 64 and (f.float32_experts or f.speakers > 0)
        stages = min(config.stages, 3) if block_r == 64 and f.float32_experts else config.stages
        warps = 8 if block_m >= 64 and large else config.warps
        self.partial = Launcher(
            "partial", (tiles, self.split, _tiles(f.m, block_m)), warps, stages,
            **_decoding(f, block_d, config.scale == "after"), **common, EBLOCK=f.a_block,
            BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_D=block_d, BLOCK_R=block_r,
            BLOCK_E=gating["BLOCK_E"],
        )  # fmt: skip
        block_r = min(64, max(16, _power_of_2(f.columns)))
        warps = config.warps
        if block_m >= 64 and block_r == 64:
            warps = 8  # with fewer the tiles do not fit the registers
        elif f.speakers and (block_m == 16 or (block_m == 32 and block_r < 64)):
            warps = 2
        self.finish = Launcher(
            "finish", (_tiles(f.n, block_o), _tiles(f.m, block_m)), warps, 1,
            **common, **gating, EBLOCK=f.b_block, BIAS=f.bias, BLOCK_M=block_m, BLOCK_O=block_o,
            BLOCK_R=block_r,
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
    ) -> Tensor:
        """y [M, N]."""
        f, split = self.facts, self.split
        router, given = (gates, None) if f.gating is not None else (None, gates)
        base = x.new_empty((split, f.m, f.n), dtype=torch.float32)
        projected = x.new_empty((split, f.m, self.all_columns), dtype=torch.float32)
        y = x.new_empty((f.m, f.n))
        self.partial(
            x, base, projected, *weight, a, a_scales, router, given, speakers,
            self.m, f.k, f.n, *self.sizes, *f.a_strides,
        )  # fmt: skip
        self.finish(
            base, projected, y, b, b_scales, given, bias, speakers,
            self.m, f.n, *self.sizes, scaling, self.inverse_temperature, *f.b_strides,
        )  # fmt: skip
        return y


class Fill:
    """The weight dequantised to scratch: W, [W | B] with `beside` columns or [W ; A ; V] below."""

    def __init__(self, facts: Facts, *, beside: int = 0, below: int = 0) -> None:
        f = facts
        self.shape = (f.n + below, f.k + beside)
        block_k = min(64, f.block_size)
        decoding = _decoding(f, block_k)
        del decoding["AFTER"]  # nothing is multiplied here
        strides = (f.b_strides if beside else f.a_strides)[1:] if beside or below else (0, 0, 0)
        self.sizes = (f.n, f.k, f.columns, f.experts, max(1, f.rank), self.shape[1], *strides)
        down, across = _tiles(f.n, 32) + _tiles(below, 32), _tiles(f.k, block_k)
        self.launch = Launcher(
            "dequantize", (down, across + _tiles(beside, block_k)), 4, 1,
            **decoding, BESIDE=beside, BELOW=below, ROUTER=below > 0 and f.gating is not None,
            EBLOCK=f.b_block if beside else 0, BLOCK_N=32, BLOCK_K=block_k,
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


class ForwardPlan:
    """The forward of calls of one kind."""

    def __init__(self, facts: Facts, keep: bool) -> None:
        """With `keep` a call also returns P and the gates, which the backward wants."""
        f = self.facts = facts
        config = f.config("forward")
        if keep and config.route == "decode":
            config = replace(config, route="split")  # whose projection is whole
        self.route, self.keep = config.route, keep and f.columns > 0
        self.stride = f.columns
        self.decode = self.project = self.product = self.fill = None
        if config.route == "decode" and f.columns:
            self.decode = _Decode(f, config)
            return
        pad = 0
        if config.route == "scratch":
            pad = -f.columns % CUBLAS_COLUMNS if f.columns else 0
            self.stride = f.k + f.columns + pad
            self.fill = Fill(f, beside=f.columns + pad)
        elif config.route == "dense":
            self.fill = Fill(f)
        if f.columns:
            self.project = _Projection(
                f, plain=self.keep, copy=config.route == "scratch", pad=pad
            )  # fmt: skip
        if config.route != "scratch":
            self.product = _Product(f, config, transposed=False)

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
        if self.decode is not None:
            given = (x, weight, a, a_scales, b, b_scales, gates, bias, speakers, scaling)
            return self.decode(*given), None, None
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
                weight = (self.fill(weight, x), None, None, None, None, None)
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
            self.again = _Projection(f, plain=True, copy=False, pad=0)
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
            self.product = _Product(f, config, transposed=True)
        self.narrow = None
        self.gradients = None
        if not f.columns:
            return
        self.m, self.people = Varying(f.m), Varying(max(1, f.speakers))
        self.inverse_temperature = f.inverse_temperature()
        of_router = routed and need_gates
        people = int(self.people)
        block_r = min(64, max(16, _power_of_2(self.columns)))
        first = 0 if need_a else f.columns
        last = self.columns if of_router else f.columns
        tiles = _tiles(last - first, block_r) * _tiles(f.k, GRADIENT_TILE)
        if need_b:
            tiles += _tiles(f.columns, block_r) * _tiles(f.n, GRADIENT_TILE)
        # Each share holds the experts of every speaker.
        self.split = max(1, min(_tiles(f.m, SHARE_TOKENS), 16 // people))
        self.counters = tiles * people if self.split > 1 else 0
        self.shares = tiles * people * self.split * block_r * GRADIENT_TILE
        if tiles:
            self.gradients = Launcher(
                "gradients", (tiles, self.split, people), 4, 3,
                A=need_a, B=need_b, ROUTER=of_router, SHARED=self.split > 1,
                SPEAKERS=f.speakers > 0, PRECISION=f.precision,
                BLOCK_R=block_r, BLOCK_O=GRADIENT_TILE, BLOCK_M=32 if f.exact else 64,
            )  # fmt: skip
        if need_x or need_a or self.through:
            together, block_m, block_r, block_d = _narrow_tiles(f, True)
            tail = (f.experts if routed else 0) + pad
            # Gates and their gradients lie in registers beside the tile.
            large = block_m == 64 or (block_r >= 64 and f.float32_experts)
            self.narrow = Launcher(
                "project_backward", (_tiles(f.m, block_m),), 8 if large else 4,
                2 if block_r > 64 else 3,
                ROUTER=routed, THROUGH=self.through, DGATES=need_gates and not routed,
                COPY=widened, TAIL=tail, SPEAKERS=f.speakers > 0, PRECISION=f.precision,
                TOGETHER=together, BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_D=block_d,
                BLOCK_E=max(16, _power_of_2(f.experts + pad)),
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
            dx = self._base_alone(dy, x, weight, dx_dtype) if need_x else None
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
        if wide is not None:
            assert self.fill is not None
            dx = wide @ self.fill(weight, dy, a, None, router)
            dx = dx if dx_dtype is None else dx.to(dx_dtype)
        elif need_x:
            assert self.product is not None
            if self.fill is not None:
                weight = (self.fill(weight, dy), None, None, None, None, None)
            dx = self.product(
                dy, weight, None, speakers, small, self.stride, a, None, router,
                dtype=dx_dtype,
            )  # fmt: skip
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

    def _base_alone(
        self, dy: Tensor, x: Tensor, weight: WeightParts, dtype: torch.dtype | None
    ) -> Tensor:
        if self.route == "scratch":
            assert self.fill is not None
            dx = dy.view(self.facts.m, -1) @ self.fill(weight, dy)
            return dx if dtype is None else dx.to(dtype)
        assert self.product is not None
        if self.fill is not None:
            weight = (self.fill(weight, dy), None, None, None, None, None)
        return self.product(dy, weight, None, None, dtype=dtype)


def _narrow_tiles(f: Facts, gates: bool) -> tuple[int, int, int, int]:
    """Experts together, rows, columns and depth of a tile that projects on the experts.

    `gates` says that they, or their gradients, are made beside it.
    """
    together = min(f.experts, max(1, 64 // f.rank))
    block_r = max(16, _power_of_2(together * f.rank))
    block_m = 16 if block_r > 128 else _tile_rows(f.m, f.traits[1])
    block_d = 64  # at 128 some of its kernels do not fit the registers (sm_87)
    if f.exact and (gates or f.speakers):
        block_m, block_d = 16, FLOAT32_TILE
    return together, block_m, block_r, block_d


def _tile_rows(m: int, processors: int) -> int:
    """Rows of a program that goes through whole rows of X: as many as leave no processor idle."""
    return next((rows for rows in (64, 32) if m >= rows * processors), 16)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _power_of_2(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(0, size - 1).bit_length()


forward_plan: Callable[[Facts, bool], ForwardPlan] = lru_cache(maxsize=2048)(ForwardPlan)
backward_plan: Callable[[Facts, tuple[bool, ...], bool], BackwardPlan] = lru_cache(maxsize=2048)(
    BackwardPlan
)
on_change(forward_plan.cache_clear)  # type: ignore[attr-defined]
on_change(backward_plan.cache_clear)  # type: ignore[attr-defined]
