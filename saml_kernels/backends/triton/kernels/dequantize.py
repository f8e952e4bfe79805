"""The weight dequantised to scratch, B beside it or A below it, for products by cuBLAS."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.device import (
    expert_tile,
    projecting_tile,
    weight_tile,
)

__all__ = ["dequantize_kernel"]


@triton.jit
def dequantize_kernel(
    codes, absmax, table, out,
    experts, scales, router,                         # B [E, N, r] or A [E, r, K], of int8, [E, K]
    N, K, R, E, rank, stride,
    stride_e, stride_j, stride_o,                    # of the experts
    BITS: tl.constexpr, QBLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    PTX: tl.constexpr, BESIDE: tl.constexpr, BELOW: tl.constexpr, ROUTER: tl.constexpr,
    EBLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (row stride given) = W; or [W | B] with BESIDE columns more, or [W ; A], with ROUTER
    [W ; A ; router], with BELOW rows more; what is more than the experts' and the router's is zero.

    Grid: (tiles of N and of BELOW, tiles of K and of BESIDE).
    """
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    dtype: tl.constexpr = out.dtype.element_ty
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    lines, across = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if row_tile >= tiles_n:
        if BELOW > 0:
            rows, cols = (row_tile - tiles_n) * BLOCK_N + lines, column_tile * BLOCK_K + across
            of_router = (rows >= R) & (rows < R + E)
            a = projecting_tile(
                experts, scales, router, 0, rows, rows < R, of_router, cols, cols < K,
                K, R, E, rank, 0, stride_e, stride_j, stride_o, EBLOCK, ROUTER, dtype,
            )  # fmt: skip
            mask = (rows < BELOW)[:, None] & (cols < K)[None, :]
            out += tl.cast(N, tl.int64) * stride
            tl.store(out + rows[:, None] * stride + cols[None, :], a, mask)
    elif column_tile < tiles_k:
        first_n, first = row_tile * BLOCK_N, column_tile * BLOCK_K
        row_ok = lines < N - first_n
        w = weight_tile(
            codes, absmax, table, first_n, lines, row_ok, first, K,
            BLOCK_K, QBLOCK, BITS, ALIGNED, PTX, dtype,
        )  # fmt: skip
        cols = first + across
        mask = row_ok[:, None] & (cols < K)[None, :]
        out += tl.cast(first_n, tl.int64) * stride
        tl.store(out + lines[:, None] * stride + cols[None, :], w, mask)
    elif BESIDE > 0:
        rows = row_tile * BLOCK_N + lines
        columns = (column_tile - tiles_k) * BLOCK_K + across
        b = expert_tile(
            experts, scales, 0, columns, columns < R, rows, rows < N, rank,
            0, stride_e, stride_j, stride_o, EBLOCK,
        )  # fmt: skip
        mask = (rows < N)[:, None] & (columns < BESIDE)[None, :]
        at = out + rows.to(tl.int64)[:, None] * stride + K + columns[None, :]
        tl.store(at, b.to(dtype).T, mask)
