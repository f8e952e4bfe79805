"""Gradients of experts and router in one launch: dA = dP^T X, dV = dZ^T X, dB = dY^T H.

The reduction over tokens is shared out. Each program sums its share in float32; the last one to
finish a tile (it counts) adds the shares in a fixed order, so that the same input gives the same
bits, and puts the count back to zero. Nobody waits. Programs that read the same columns of X or dY
for different rows of a gradient run side by side.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.device import multiply
from saml_kernels.backends.triton.kernels.tickets import arrive, sum_shares

__all__ = ["gradients_kernel"]


@triton.jit
def _narrow(
    small, projected, gates, first_m, rows, row_ok, columns, column_ok,
    R, E, rank, small_stride, gates_span, scaling, OF_B: tl.constexpr,
):  # fmt: skip
    """Transposed rows of the narrow operand, [columns, rows]: [dP | dZ], or H = s P G for dB."""
    mask = column_ok[:, None] & row_ok[None, :]
    if OF_B:
        at = first_m * R + rows[None, :] * R + columns[:, None]
        p = tl.load(projected + at, mask, 0.0)
        row = (first_m + rows) // gates_span
        gate = tl.load(gates + row[None, :] * E + (columns // rank)[:, None], mask, 0.0)
        return p * gate.to(tl.float32) * scaling
    else:
        at = first_m * small_stride + rows[None, :] * small_stride + columns[:, None]
        return tl.load(small + at, mask, 0.0)


@triton.jit
def _share(
    small, projected, gates, wide, speakers, first_step, last_step, s, columns, column_ok,
    outs, out_ok, M, R, E, O, rank, small_stride, gates_span, speakers_span, scaling,
    OF_B: tl.constexpr, SPEAKERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """narrow^T wide over the given steps of the tokens: float32 [BLOCK_R, BLOCK_O]."""
    acc = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for step in range(first_step, last_step):
        first_m = tl.cast(step, tl.int64) * BLOCK_M
        rows = tl.arange(0, BLOCK_M)
        row_ok = rows < M - first_m
        if SPEAKERS:
            of = tl.load(speakers + (first_m + rows) // speakers_span, row_ok, -1)
            row_ok = row_ok & (of == s)
        left = _narrow(
            small, projected, gates, first_m, rows, row_ok, columns, column_ok,
            R, E, rank, small_stride, gates_span, scaling, OF_B,
        )  # fmt: skip
        at = first_m * O + rows[:, None] * O + outs[None, :]
        right = tl.load(wide + at, row_ok[:, None] & out_ok[None, :], 0.0)
        acc = multiply(left.to(right.dtype), right, acc, PRECISION)
    return acc


@triton.jit(
    do_not_specialize=["M", "S", "SPLIT"],
    do_not_specialize_on_alignment=["gates_span", "speakers_span"],
)
def gradients_kernel(
    small, x, projected, gates, dy, speakers,        # [M, C], [M, K], P [M, R], [.., E], [M, N]
    shares, counters, da, db, dv,                    # float32, int32, [S, E, r, K], ..., [S, E, K]
    M, K, N, E, rank, S, SPLIT, small_stride, gates_span, speakers_span, scaling,
    A: tl.constexpr, B: tl.constexpr, ROUTER: tl.constexpr, SHARED: tl.constexpr,
    SPEAKERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of [dA ; dV] and then of dB, SPLIT, S).

    A, B and ROUTER say which are wanted. With SHARED (SPLIT > 1) `shares` has room for a tile of
    each program, and `counters` a zero for each tile, before and after.
    """
    tile, split, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles, tiles_k = tl.num_programs(0), tl.cdiv(K, BLOCK_O)
    R = E * rank
    first_c = 0 if A else R
    last_c = R + E if ROUTER else R
    tiles_a, tiles_b = tl.cdiv(last_c - first_c, BLOCK_R), tl.cdiv(R, BLOCK_R)
    of_a = tiles_a * tiles_k if A or ROUTER else 0
    steps = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT)
    last = tl.minimum((split + 1) * steps, tl.cdiv(M, BLOCK_M))
    inside, across = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_O)
    # What is not wanted has no operands to compile with.
    acc = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    if tile < of_a:
        columns = first_c + (tile % tiles_a) * BLOCK_R + inside
        outs = (tile // tiles_a) * BLOCK_O + across
        if A or ROUTER:
            acc = _share(
                small, projected, gates, x, speakers, split * steps, last, s,
                columns, columns < last_c, outs, outs < K, M, R, E, K, rank,
                small_stride, gates_span, speakers_span, scaling,
                False, SPEAKERS, PRECISION, BLOCK_R, BLOCK_O, BLOCK_M,
            )  # fmt: skip
    else:
        columns = ((tile - of_a) % tiles_b) * BLOCK_R + inside
        outs = ((tile - of_a) // tiles_b) * BLOCK_O + across
        if B:
            acc = _share(
                small, projected, gates, dy, speakers, split * steps, last, s,
                columns, columns < R, outs, outs < N, M, R, E, N, rank,
                small_stride, gates_span, speakers_span, scaling,
                True, SPEAKERS, PRECISION, BLOCK_R, BLOCK_O, BLOCK_M,
            )  # fmt: skip
    mine = SPLIT == 1
    if SHARED:
        first = (s * tiles + tile).to(tl.int64) * SPLIT
        here = inside[:, None] * BLOCK_O + across[None, :]
        tl.store(shares + (first + split) * (BLOCK_R * BLOCK_O) + here, acc)
        mine = arrive(counters + s * tiles + tile) == SPLIT - 1
    if mine:
        if SHARED:
            tl.store(counters + s * tiles + tile, 0)
            tile_size: tl.constexpr = BLOCK_R * BLOCK_O
            acc = sum_shares(
                shares + first * tile_size, here, here < tile_size, tile_size, SPLIT, 4
            )  # fmt: skip
        far = s.to(tl.int64)
        if tile < of_a:
            known = outs[None, :] < K
            if A:
                at = da + far * R * K + columns[:, None] * K + outs[None, :]
                tl.store(at, acc.to(da.dtype.element_ty), (columns < R)[:, None] & known)
            if ROUTER:
                at = dv + far * E * K + (columns - R)[:, None] * K + outs[None, :]
                of_router = (columns >= R) & (columns < last_c)
                tl.store(at, acc.to(dv.dtype.element_ty), of_router[:, None] & known)
        elif B:
            where = (columns // rank) * (N * rank) + columns % rank
            at = db + far * R * N + where[:, None] + outs[None, :] * rank
            mask = (columns < R)[:, None] & (outs < N)[None, :]
            tl.store(at, acc.to(db.dtype.element_ty), mask)
