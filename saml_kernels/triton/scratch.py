"""The weight dequantised to scratch, for the large products that go to cuBLAS."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.triton.device import weight_tile

__all__ = ["scratch_kernel"]


@triton.jit
def scratch_kernel(
    codes, absmax, nested, nested_code, offset, table, out, N, K, stride,
    BITS: tl.constexpr, QBLOCK: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    PTX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [N, >= K] (row stride given) = the weight. Grid: (tiles of N, tiles of K)."""
    first_n, rows = tl.program_id(0) * BLOCK_N, tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    row_ok = rows < N - first_n
    w = weight_tile(
        codes, absmax, nested, nested_code, offset, table, first_n, rows, row_ok, first, K,
        BLOCK_K, QBLOCK, BITS, NESTED, ALIGNED, PTX, out.dtype.element_ty,
    )  # fmt: skip
    cols = first + tl.arange(0, BLOCK_K)
    mask = row_ok[:, None] & (cols < K)[None, :]
    out += tl.cast(first_n, tl.int64) * stride
    tl.store(out + rows[:, None] * stride + cols[None, :], w, mask)
