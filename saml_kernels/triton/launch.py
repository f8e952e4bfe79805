"""From tensors to kernel launches: strides, tiles and scratch, for each family of kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saml_kernels.codes import code_table, nested_code
from saml_kernels.quant import QuantizedTensor
from saml_kernels.triton.configs import Config, device_traits
from saml_kernels.triton.dispatch import interpreting, launch
from saml_kernels.triton.lookup import lookup_ptx
from saml_kernels.triton.signature import Varying

__all__ = [
    "Experts",
    "Router",
    "decode",
    "dequantize_into",
    "experts_gradient",
    "product",
    "router_gradient",
    "skinny",
]

BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8}
FLOAT32_TILE = 32  # exact float32 products go through ordinary registers: larger tiles spill
MIXED_ROWS = 64  # rows of many speakers keep masks beside the tile: larger ones spill
OUTER_TOKENS = 1024  # a share of the reduction over tokens, in dA and dB


@dataclass(frozen=True)
class Experts:
    """Stacked experts as kernels see them: lora_a or lora_b, with a leading speaker dimension.

    Attributes:
        tensor: [S, E, r, K] (A) or [S, E, N, r] (B), contiguous.
        is_a: which of the two.
        speakers: int32 [M] or None, where S is 1.
        scales: float32, one for each `block` elements as they lie, where `tensor` is int8.
    """

    tensor: Tensor
    is_a: bool
    speakers: Tensor | None
    scales: Tensor | None = None
    block: int = 0

    @property
    def count(self) -> int:
        """E."""
        return self.tensor.shape[1]

    @property
    def rank(self) -> int:
        """r."""
        return self.tensor.shape[2 if self.is_a else 3]

    def strides(self) -> tuple[int, int, int, int]:
        """Of speaker, expert, direction within the expert, feature."""
        s, e, first, second = self.tensor.stride()
        return (s, e, first, second) if self.is_a else (s, e, second, first)


@dataclass(frozen=True)
class Router:
    """Gates from a linear map of the token.

    Attributes:
        weight: [S, E, K], contiguous.
        top_k: gates kept, or None for all.
        temperature: the logits are divided by it.
    """

    weight: Tensor
    top_k: int | None = None
    temperature: float = 1.0

    def constants(self) -> dict[str, int]:
        """Compile-time facts."""
        experts = self.weight.shape[1]
        kept = self.top_k if self.top_k is not None and self.top_k < experts else 0
        return {"TOP_K": kept, "BLOCK_E": max(16, _power_of_2(experts))}


_NO_ROUTER = {"TOP_K": 0, "BLOCK_E": 16}


def precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user's torch setting allows TF32."""
    if dtype == torch.bfloat16 and interpreting():
        return "emulated"
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def _quantised(
    weight: QuantizedTensor | Tensor, dtype: torch.dtype, along: int, after: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pointers and compile-time facts of a weight, for tiles `along` wide along its rows.

    `after` asks for scales after the product, which AFTER grants where blocks and tiles allow it.
    """
    facts: dict[str, Any]
    if isinstance(weight, Tensor):
        facts = {"BITS": 16, "QBLOCK": 0, "NESTED": False, "PTX": ""}
        return (weight,) * 6, facts | {"ALIGNED": False, "AFTER": False}
    nested, bits = weight.nested_absmax is not None, BITS[weight.format]
    pointers = (
        weight.codes,
        weight.absmax,
        weight.nested_absmax if nested else weight.absmax,
        nested_code(weight.device) if nested else weight.absmax,
        weight.offset if nested else weight.absmax,
        code_table(weight.format, weight.device) if bits == 4 else weight.absmax,
    )
    aligned = weight.shape[1] % weight.block_size == 0 and weight.block_size % along == 0
    after = after and aligned
    # Scaled before, a code in float16 is as good as in bfloat16 and better.
    value = dtype if after or dtype == torch.float32 else torch.float16
    permutes = bits == 4 and not interpreting() and torch.version.hip is None
    ptx = lookup_ptx(weight.format, str(value).removeprefix("torch.")) if permutes else ""
    facts = {"BITS": bits, "QBLOCK": weight.block_size, "NESTED": nested, "PTX": ptx}
    return pointers, facts | {"ALIGNED": aligned, "AFTER": after}


def product(
    x: Tensor,
    weight: QuantizedTensor | Tensor,
    config: Config,
    *,
    transposed: bool,
    hidden: Tensor | None = None,
    experts: Experts | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T (or x W, transposed) + hidden times the experts + bias.

    Args:
        x: [M, K], contiguous ([M, N] transposed).
        weight: [N, K], quantised, or contiguous in the dtype of `x`.
        config: tiles, and `split`.
        transposed: dY W instead of X W^T.
        hidden: [M, R] in the dtype of `x`; experts: B (A when transposed).
        bias: [N] or None.
    """
    n, width = weight.shape
    m, d = x.shape
    out = width if transposed else n
    block_m, block_o, block_d = config.block_m, config.block_o, config.block_d
    exact = x.dtype == torch.float32
    if exact:
        block_m, block_o, block_d = (min(b, FLOAT32_TILE) for b in (block_m, block_o, block_d))
    warps = config.warps
    if experts is not None and experts.speakers is not None:
        if block_m > MIXED_ROWS:
            block_m, warps = MIXED_ROWS, 4
        if exact:
            block_m = 16
    along = block_o if transposed else block_d
    if isinstance(weight, QuantizedTensor):
        along = min(along, weight.block_size)
    block_o, block_d = (along, block_d) if transposed else (block_o, along)
    after = config.scale == "after" and not transposed
    pointers, facts = _quantised(weight, x.dtype, along, after)
    split = config.split
    y = x.new_empty(m, out)
    partial = y if split == 1 else x.new_empty(split, m, out, dtype=torch.float32)
    rank = experts.rank if experts else 1
    r = experts.count * rank if experts else 0
    speakers = experts.speakers if experts else None
    tiles = _tiles(m, block_m) * _tiles(out, block_o)
    launch(
        "product", (tiles, split),
        x, partial, *pointers,
        x if hidden is None else hidden, experts.tensor if experts else x,
        x if experts is None or experts.scales is None else experts.scales,
        x if bias is None else bias, x if speakers is None else speakers,
        Varying(m), d, out, width, r, rank, Varying(len(experts.tensor) if experts else 1),
        Varying(split),
        *(experts.strides() if experts else (0, 0, 0, 0)),
        TRANSPOSED=transposed, **facts, PRECISION=precision(x.dtype),
        EXPERTS=r > 0, EBLOCK=experts.block if experts else 0,
        SPEAKERS=speakers is not None, BIAS=bias is not None and split == 1,
        BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_D=block_d,
        BLOCK_R=min(16 if exact else 64, max(16, _power_of_2(max(1, r)))),
        GROUP=config.group,
        warps=warps, stages=config.stages,
    )  # fmt: skip
    if split > 1:
        launch(
            "reduce", (_tiles(m * out, 1024),),
            partial, y, x if bias is None else bias, Varying(m), out, Varying(split),
            BIAS=bias is not None, BLOCK=1024, warps=4, stages=1,
        )  # fmt: skip
    return y


def skinny(
    x: Tensor,
    experts: Experts,
    gates: Tensor,
    scaling: float,
    *,
    gated: Tensor,
    router: Router | None = None,
    plain: Tensor | None = None,
    projected: Tensor | None = None,
    dgates: Tensor | None = None,
    backward: bool = False,
) -> None:
    """Project rows on the experts and gate them, into the tensors given.

    Args:
        x: [M, K] (forward, experts A) or dY [M, N] (backward, experts B), contiguous.
        experts: A or B.
        gates: [M, E], contiguous; with a router float32, to be filled.
        scaling: s.
        router: makes the gates, forward.
        gated: [M, R], rows may be further apart: s P G, or s dY B G.
        plain: float32 [M, R] for P, forward.
        projected: the same P, backward, with `dgates` [M, E] to fill.
        backward: which of the two.
    """
    m, d = x.shape
    count, rank = experts.count, experts.rank
    together = min(count, max(1, 64 // rank))
    block_r = max(16, _power_of_2(together * rank))
    block_m = 16 if block_r > 128 else _tile_rows(m, device_traits(x.device)[1])
    mixed = experts.speakers is not None
    block_d = 64  # at 128 some of its kernels do not fit the registers (sm_87)
    if x.dtype == torch.float32 and (router is not None or mixed):
        block_m, block_d = 16, FLOAT32_TILE
    launch(
        "skinny", (_tiles(m, block_m), _tiles(count, together)),
        x, experts.tensor, x if experts.scales is None else experts.scales,
        x if router is None else router.weight, gates,
        x if experts.speakers is None else experts.speakers,
        gated if plain is None else plain, gated,
        gated if projected is None else projected, gated if dgates is None else dgates,
        Varying(m), d, count, rank, Varying(len(experts.tensor)), gated.stride(0), float(scaling),
        1.0 / (1.0 if router is None else router.temperature), *experts.strides(),
        EBLOCK=experts.block, ROUTER=router is not None,
        **(_NO_ROUTER if router is None else router.constants()),
        BACKWARD=backward, SKIP=m <= 16 and not backward and plain is None and router is None,
        PLAIN=plain is not None, DGATES=dgates is not None,
        SPEAKERS=mixed, PRECISION=precision(x.dtype),
        TOGETHER=together, BLOCK_M=block_m, BLOCK_R=block_r,
        BLOCK_D=block_d,
        warps=4, stages=2 if block_r > 64 else 3,
    )  # fmt: skip


def router_gradient(gates: Tensor, dgates: Tensor, temperature: float, out: Tensor) -> None:
    """Fill out [M, E] (rows may be further apart) with the gradient of the logits.

    Args:
        gates, dgates: float32 [M, E], contiguous.
        temperature: of the softmax.
        out: what to fill.
    """
    m, experts = gates.shape
    launch(
        "router_gradient", (_tiles(m, 64),),
        gates, dgates, out, Varying(m), experts, out.stride(0), 1.0 / temperature,
        BLOCK_M=64, BLOCK_E=max(16, _power_of_2(experts)), warps=4, stages=1,
    )  # fmt: skip


def decode(
    x: Tensor,
    weight: QuantizedTensor,
    config: Config,
    a: Experts,
    b: Experts,
    gates: Tensor | None,
    router: Router | None,
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    """The whole forward in two launches, for a few tokens: y [M, N].

    Args:
        x: [M, K], contiguous.
        weight: quantised [N, K].
        config: tiles, and `split`.
        a, b: the experts.
        gates: [M, E], contiguous, or None where `router` makes them.
        router: see there.
        bias: [N] or None.
        scaling: s.
    """
    n, k = weight.shape
    m = x.shape[0]
    count, rank, speakers = a.count, a.rank, a.speakers
    r = count * rank
    columns = r + (count if router else 0)
    small = FLOAT32_TILE if x.dtype == torch.float32 else 256
    block_m, block_o = min(config.block_m, small), min(config.block_o, small)
    block_d = min(config.block_d, small, weight.block_size)
    block_r = min(64, max(16, _power_of_2(columns)))
    pointers, facts = _quantised(weight, x.dtype, block_d, config.scale == "after")
    split = config.split
    base = x.new_empty(split, m, n, dtype=torch.float32)
    projected = x.new_empty(split, m, columns, dtype=torch.float32)
    tiles = _tiles(columns, block_r) + _tiles(n, block_o)
    common = {
        "ROUTER": router is not None, "SPEAKERS": speakers is not None,
        "PRECISION": precision(x.dtype),
    }  # fmt: skip
    launch(
        "partial", (tiles, split, _tiles(m, block_m)),
        x, base, projected, *pointers,
        a.tensor, x if a.scales is None else a.scales,
        x if router is None else router.weight, x if gates is None else gates,
        x if speakers is None else speakers,
        Varying(m), k, n, r, count, rank, Varying(len(a.tensor)), Varying(split), *a.strides(),
        **facts, **common, EBLOCK=a.block,
        BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_D=block_d, BLOCK_R=block_r,
        warps=config.warps, stages=config.stages,
    )  # fmt: skip
    y = x.new_empty(m, n)
    launch(
        "finish", (_tiles(n, block_o), _tiles(m, block_m)),
        base, projected, y, b.tensor, x if b.scales is None else b.scales,
        x if gates is None else gates,
        x if bias is None else bias, x if speakers is None else speakers,
        Varying(m), n, r, count, rank, Varying(len(b.tensor)), Varying(split), float(scaling),
        1.0 / (1.0 if router is None else router.temperature), *b.strides(),
        **common, **(_NO_ROUTER if router is None else router.constants()),
        EBLOCK=b.block, BIAS=bias is not None, BLOCK_M=block_m, BLOCK_O=block_o,
        BLOCK_R=min(64, max(16, _power_of_2(r))),
        warps=config.warps if speakers is None else 2, stages=1,
    )  # fmt: skip
    return y


def experts_gradient(narrow: Tensor, wide: Tensor, like: Experts) -> Tensor:
    """narrow^T wide for each speaker's rows, in the shape and dtype of `like.tensor`.

    Args:
        narrow: [M, R]; wide: [M, K] (for A) or [M, N] (for B); both contiguous.
        like: the experts whose gradient this is.
    """
    m, out = wide.shape
    speakers, r = len(like.tensor), like.count * like.rank
    # Each share holds the experts of every speaker.
    split = max(1, min(math.ceil(m / OUTER_TOKENS), 16 // speakers))
    block_m = 32 if wide.dtype == torch.float32 else 64
    block_r = min(64, max(16, _power_of_2(r)))
    shares = torch.empty(split, *like.tensor.shape, dtype=torch.float32, device=wide.device)
    tiles = _tiles(r, block_r) * _tiles(out, 64)
    launch(
        "outer", (tiles, split, speakers),
        narrow, wide, wide if like.speakers is None else like.speakers, shares,
        Varying(m), r, out, like.rank, Varying(speakers), Varying(split), like.tensor.numel(),
        *like.strides(),
        SPEAKERS=like.speakers is not None, PRECISION=precision(wide.dtype),
        BLOCK_R=block_r, BLOCK_O=64, BLOCK_M=block_m,
        warps=4, stages=3,
    )  # fmt: skip
    total = shares[0] if split == 1 else shares.sum(0)
    return total.to(like.tensor.dtype)


def dequantize_into(weight: QuantizedTensor, out: Tensor) -> None:
    """Fill out[:, :K] ([N, >= K], unit stride along K) with the weight, in the dtype of `out`."""
    n, k = weight.shape
    block_k = min(64, weight.block_size)
    pointers, facts = _quantised(weight, out.dtype, block_k)
    del facts["AFTER"]  # nothing is multiplied here
    launch(
        "scratch", (_tiles(n, 32), _tiles(k, block_k)),
        *pointers, out, n, k, out.stride(0), **facts, BLOCK_N=32, BLOCK_K=block_k,
        warps=4, stages=1,
    )  # fmt: skip


def _tile_rows(m: int, processors: int) -> int:
    """Rows of a program that goes through whole rows of X: as many as leave no processor idle."""
    return next((rows for rows in (64, 32) if m >= rows * processors), 16)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _power_of_2(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (size - 1).bit_length()
