"""From tensors to kernel launches: strides, tiles and scratch, for each family of kernels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from saml_kernels.codes import code_table, nested_code
from saml_kernels.quant import QuantizedTensor
from saml_kernels.triton.configs import Config
from saml_kernels.triton.lookup import lookup_ptx
from saml_kernels.triton.outer import outer_kernel
from saml_kernels.triton.product import product_kernel, reduce_kernel
from saml_kernels.triton.scratch import scratch_kernel
from saml_kernels.triton.skinny import skinny_kernel

__all__ = [
    "Experts",
    "Launch",
    "dequantize_into",
    "experts_gradient",
    "product",
    "recording",
    "skinny",
]

BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8}
FLOAT32_TILE = 32  # exact float32 products go through ordinary registers: larger tiles spill
OUTER_TOKENS = 1024  # a share of the reduction over tokens, in dA and dB


@dataclass(frozen=True)
class Experts:
    """Stacked experts as kernels see them: lora_a or lora_b, with a leading speaker dimension.

    Attributes:
        tensor: [S, E, r, K] (A) or [S, E, N, r] (B), contiguous.
        is_a: which of the two.
        speakers: int32 [M] or None, where S is 1.
    """

    tensor: Tensor
    is_a: bool
    speakers: Tensor | None

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


_recorded: list[Launch] | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what `saml_kernels.aot` compiles."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the block kernels are noted down instead of launched."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def _launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int, **constants: Any
) -> None:
    if _recorded is not None:
        options = {"num_warps": warps, "num_stages": stages}
        _recorded.append(Launch(kernel, arguments, constants, options))
        return
    first = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        # Said explicitly: Triton's default is about to change, and bits with it.
        kernel[grid](
            *arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True
        )


def precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user's torch setting allows TF32."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "emulated"
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _quantised(
    weight: QuantizedTensor, dtype: torch.dtype, *blocks: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pointers and compile-time facts of a weight, for tiles of the given sizes along its rows."""
    nested = weight.nested_absmax is not None
    pointers = (
        weight.codes,
        weight.absmax,
        weight.nested_absmax if nested else weight.absmax,
        nested_code(weight.device) if nested else weight.absmax,
        weight.offset if nested else weight.absmax,
        code_table(weight.format, weight.device) if BITS[weight.format] == 4 else weight.absmax,
    )
    aligned = weight.shape[1] % weight.block_size == 0
    aligned = aligned and all(weight.block_size % b == 0 for b in blocks)
    permutes = (
        BITS[weight.format] == 4
        and not triton.knobs.runtime.interpret
        and torch.version.hip is None
    )
    facts = {
        "BITS": BITS[weight.format],
        "QBLOCK": weight.block_size,
        "NESTED": nested,
        "ALIGNED": aligned,
        "PTX": lookup_ptx(weight.format, 4 if dtype == torch.float32 else 2) if permutes else "",
    }
    return pointers, facts


def product(
    x: Tensor,
    weight: QuantizedTensor,
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
        weight: quantised [N, K].
        config: tiles, and `split`.
        transposed: dY W instead of X W^T.
        hidden: [M, R] in the dtype of `x`; experts: B (A when transposed).
        bias: [N] or None.
    """
    n, width = weight.shape
    m, d = x.shape
    out = width if transposed else n
    block_m, block_o, block_d = config.block_m, config.block_o, config.block_d
    if x.dtype == torch.float32:
        block_m, block_o, block_d = (min(b, FLOAT32_TILE) for b in (block_m, block_o, block_d))
    along = min(block_o if transposed else block_d, weight.block_size)
    block_o, block_d = (along, block_d) if transposed else (block_o, along)
    pointers, facts = _quantised(weight, x.dtype, along)
    split = config.split
    y = x.new_empty(m, out)
    partial = y if split == 1 else x.new_empty(split, m, out, dtype=torch.float32)
    rank = experts.rank if experts else 1
    r = experts.count * rank if experts else 0
    speakers = experts.speakers if experts else None
    tiles = triton.cdiv(m, block_m) * triton.cdiv(out, block_o)
    _launch(
        product_kernel, (tiles, split),
        x, partial, *pointers,
        x if hidden is None else hidden, experts.tensor if experts else x,
        x if bias is None else bias, x if speakers is None else speakers,
        m, d, out, width, r, rank, len(experts.tensor) if experts else 1,
        *(experts.strides() if experts else (0, 0, 0, 0)),
        TRANSPOSED=transposed, **facts, PRECISION=precision(x.dtype),
        EXPERTS=r > 0, SPEAKERS=speakers is not None, BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_D=block_d,
        BLOCK_R=min(64, max(16, triton.next_power_of_2(max(1, r)))),
        SPLIT=split, GROUP=config.group,
        warps=config.warps, stages=config.stages,
    )  # fmt: skip
    if split > 1:
        _launch(
            reduce_kernel, (triton.cdiv(m * out, 1024),),
            partial, y, x if bias is None else bias, m, out,
            BIAS=bias is not None, SPLIT=split, BLOCK=1024, warps=4, stages=1,
        )  # fmt: skip
    return y


def skinny(
    x: Tensor,
    experts: Experts,
    gates: Tensor,
    scaling: float,
    *,
    gated: Tensor,
    plain: Tensor | None = None,
    projected: Tensor | None = None,
    dgates: Tensor | None = None,
    backward: bool = False,
) -> None:
    """Project rows on the experts and gate them, into the tensors given.

    Args:
        x: [M, K] (forward, experts A) or dY [M, N] (backward, experts B), contiguous.
        experts: A or B.
        gates: [M, E], contiguous.
        scaling: s.
        gated: [M, R], rows may be further apart: s P G, or s dY B G.
        plain: float32 [M, R] for P, forward.
        projected: the same P, backward, with `dgates` [M, E] to fill.
        backward: which of the two.
    """
    m, d = x.shape
    count, rank = experts.count, experts.rank
    together = min(count, max(1, 64 // rank))
    block_r = max(16, triton.next_power_of_2(together * rank))
    block_m = 16 if m <= 16 or block_r > 128 else 64
    _launch(
        skinny_kernel, (triton.cdiv(m, block_m), triton.cdiv(count, together)),
        x, experts.tensor, gates, x if experts.speakers is None else experts.speakers,
        gated if plain is None else plain, gated,
        gated if projected is None else projected, gated if dgates is None else dgates,
        m, d, count, rank, len(experts.tensor), gated.stride(0), float(scaling),
        *experts.strides(),
        BACKWARD=backward, SKIP=m <= 16 and not backward and plain is None,
        PLAIN=plain is not None, DGATES=dgates is not None,
        SPEAKERS=experts.speakers is not None, PRECISION=precision(x.dtype),
        TOGETHER=together, BLOCK_M=block_m, BLOCK_R=block_r,
        BLOCK_D=128 if block_r <= 64 and block_m == 16 else 64,
        warps=4, stages=2 if block_r > 64 else 3,
    )  # fmt: skip


def experts_gradient(narrow: Tensor, wide: Tensor, like: Experts) -> Tensor:
    """narrow^T wide for each speaker's rows, in the shape and dtype of `like.tensor`.

    Args:
        narrow: [M, R]; wide: [M, K] (for A) or [M, N] (for B); both contiguous.
        like: the experts whose gradient this is.
    """
    m, out = wide.shape
    speakers, r = len(like.tensor), like.count * like.rank
    split = max(1, min(16, math.ceil(m / OUTER_TOKENS)))
    block_m = 32 if wide.dtype == torch.float32 else 64
    block_r = min(64, max(16, triton.next_power_of_2(r)))
    shares = torch.empty(split, *like.tensor.shape, dtype=torch.float32, device=wide.device)
    tiles = triton.cdiv(r, block_r) * triton.cdiv(out, 64)
    _launch(
        outer_kernel, (tiles, split, speakers),
        narrow, wide, wide if like.speakers is None else like.speakers, shares,
        m, r, out, like.rank, speakers, like.tensor.numel(), *like.strides(),
        SPEAKERS=like.speakers is not None, PRECISION=precision(wide.dtype), SPLIT=split,
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
    _launch(
        scratch_kernel, (triton.cdiv(n, 32), triton.cdiv(k, block_k)),
        *pointers, out, n, k, out.stride(0), **facts, BLOCK_N=32, BLOCK_K=block_k,
        warps=4, stages=1,
    )  # fmt: skip
