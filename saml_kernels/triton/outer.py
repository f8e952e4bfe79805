"""Gradients of the experts: dA = dP^T X and dB = dY^T H, the reduction over tokens split.

Each program sums its share of the tokens in float32; the shares are added afterwards in a fixed
order, so that the same input gives the same bits.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.triton.device import multiply

__all__ = ["outer_kernel"]


@triton.jit(do_not_specialize=["M", "S", "SPLIT"])
def outer_kernel(
    narrow, wide, speakers, out,                     # [M, R], [M, O], [M], [SPLIT, S, ...] float32
    M, R, O, rank, S, SPLIT, part,                   # part: elements of one share
    stride_s, stride_e, stride_j, stride_o,          # of the experts, as in `out`
    SPEAKERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of R times tiles of O, SPLIT, S). Tiles without its rows are skipped."""
    tiles_o = tl.cdiv(O, BLOCK_O)
    columns = (tl.program_id(0) // tiles_o) * BLOCK_R + tl.arange(0, BLOCK_R)
    outs = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    column_ok, out_ok = columns < R, outs < O
    split, s = tl.program_id(1), tl.program_id(2)
    acc = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    steps = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(M, BLOCK_M))):
        first_m = tl.cast(step, tl.int64) * BLOCK_M
        rows = tl.arange(0, BLOCK_M)
        row_ok = rows < M - first_m
        if SPEAKERS:
            row_ok = row_ok & (tl.load(speakers + first_m + rows, row_ok, -1) == s)
        if tl.max(row_ok.to(tl.int32), 0) > 0:
            left = tl.load(
                narrow + first_m * R + rows[None, :] * R + columns[:, None],
                row_ok[None, :] & column_ok[:, None],
                0.0,
            )
            right = tl.load(
                wide + first_m * O + rows[:, None] * O + outs[None, :],
                row_ok[:, None] & out_ok[None, :],
                0.0,
            )
            acc = multiply(left.to(right.dtype), right, acc, PRECISION)
    at = split.to(tl.int64) * part + s.to(tl.int64) * stride_s
    expert, direction = columns // rank, columns % rank
    where = expert * stride_e + direction * stride_j
    where = where[:, None] + outs[None, :] * stride_o
    tl.store(out + at + where, acc, column_ok[:, None] & out_ok[None, :])
