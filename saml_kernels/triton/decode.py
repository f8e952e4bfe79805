"""A few tokens in two launches: partial sums of everything that reads X, then everything else.

Decoding is bound by bytes and by launches. `partial_kernel` shares the reduction out among
programs and reads each byte of the weight once; beside it, programs of the same launch project on
the experts and, where there is one, the router. `finish_kernel` adds the shares in a fixed order,
makes gates and H, and puts the experts and the bias on top.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.triton.device import (
    add_experts,
    base_product,
    expert_tile,
    gates_of,
    multiply,
    rows_of,
    speaker_range,
    spread,
)

__all__ = ["finish_kernel", "partial_kernel"]


@triton.jit(do_not_specialize=["M", "S", "SPLIT"])
def partial_kernel(
    x, base, projected,                              # [M, D], [SPLIT, M, O], [SPLIT, M, R (+ E)]
    codes, absmax, nested, nested_code, offset, table,
    experts, scales, router, gates, speakers,        # [S, ...], of int8, [S, E, D], [M, E], [M]
    M, D, O, R, E, rank, S, SPLIT,
    stride_s, stride_e, stride_j, stride_d,          # of the experts
    BITS: tl.constexpr, QBLOCK: tl.constexpr, NESTED: tl.constexpr,
    ALIGNED: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
    EBLOCK: tl.constexpr, ROUTER: tl.constexpr, SPEAKERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of [A ; router] plus tiles of O, SPLIT, tiles of M).

    Without a router, experts that no row of the tile chose are left unread.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    rows, row_ok, speaker = rows_of(tl.program_id(2), M, speakers, S, SPEAKERS, BLOCK_M)
    dtype: tl.constexpr = x.dtype.element_ty
    steps = tl.cdiv(tl.cdiv(D, BLOCK_D), SPLIT)
    last = tl.minimum((split + 1) * steps, tl.cdiv(D, BLOCK_D))
    C = R + E if ROUTER else R
    tiles_c = tl.cdiv(C, BLOCK_R)
    at = split.to(tl.int64) * M + rows[:, None]
    if tile >= tiles_c:
        first_o = (tile - tiles_c) * BLOCK_O
        outs = first_o + tl.arange(0, BLOCK_O)
        acc = base_product(
            x, rows, row_ok, codes, absmax, nested, nested_code, offset, table,
            first_o, outs, outs < O, split * steps, last, D, D,
            False, BITS, QBLOCK, NESTED, ALIGNED, PTX, PRECISION, BLOCK_M, BLOCK_O, BLOCK_D,
        )  # fmt: skip
        tl.store(base + at * O + outs[None, :], acc, row_ok[:, None] & (outs < O)[None, :])
    else:
        columns = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        of_expert, of_router = columns < R, (columns >= R) & (columns < C)
        if not ROUTER:
            where = gates + rows[:, None] * E + (columns // rank)[None, :]
            gate = tl.load(where, row_ok[:, None] & of_expert[None, :], 0.0).to(tl.float32)
            of_expert = of_expert & (tl.max(tl.abs(gate), 0) > 0)
        begin, end = speaker_range(speaker, S, SPEAKERS)
        found = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for step in range(split * steps, last):
            ds = step * BLOCK_D + tl.arange(0, BLOCK_D)
            d_ok = ds < D
            seen = tl.load(
                x + rows[:, None] * D + ds[None, :], row_ok[:, None] & d_ok[None, :], 0.0
            )
            for s in range(begin, end):
                mine = tl.where(speaker[:, None] == s, seen, 0.0) if SPEAKERS else seen
                a = expert_tile(
                    experts, scales, s, columns, of_expert, ds, d_ok, rank,
                    stride_s, stride_e, stride_j, stride_d, EBLOCK,
                ).to(dtype)  # fmt: skip
                if ROUTER:
                    z = expert_tile(
                        router, router, s, columns - R, of_router, ds, d_ok, 1,
                        E.to(tl.int64) * D, D, 0, 1, 0,
                    )  # fmt: skip
                    a = tl.where(of_router[:, None], z.to(dtype), a)
                found = multiply(mine.to(dtype), a.T, found, PRECISION)
        mask = row_ok[:, None] & (columns < C)[None, :]
        tl.store(projected + at * C + columns[None, :], found, mask)


@triton.jit(do_not_specialize=["M", "S", "SPLIT"])
def finish_kernel(
    base, projected, y,                              # [SPLIT, M, O], [SPLIT, M, R (+ E)], [M, O]
    experts, scales, gates, bias, speakers,          # B, of int8, [M, E] in, [O], [M]
    M, O, R, E, rank, S, SPLIT, scaling, warmth,
    stride_s, stride_e, stride_j, stride_o,          # of the experts
    EBLOCK: tl.constexpr, ROUTER: tl.constexpr, TOP_K: tl.constexpr,
    SPEAKERS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of O, tiles of M)."""
    rows, row_ok, speaker = rows_of(tl.program_id(1), M, speakers, S, SPEAKERS, BLOCK_M)
    begin, end = speaker_range(speaker, S, SPEAKERS)
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    out_ok = outs < O
    dtype: tl.constexpr = y.dtype.element_ty
    C = R + E if ROUTER else R
    size = M.to(tl.int64)
    ok = row_ok[:, None] & out_ok[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    if ROUTER:
        number = tl.arange(0, BLOCK_E)
        exists = row_ok[:, None] & (number < E)[None, :]
        logits = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for split in range(SPLIT):
            where = (split * size + rows[:, None]) * C + R + number[None, :]
            logits += tl.load(projected + where, exists, 0.0)
        found = gates_of(logits * warmth, E, TOP_K, BLOCK_E)
    for first in range(0, R, BLOCK_R):
        columns = first + tl.arange(0, BLOCK_R)
        column_ok = columns < R
        mask = row_ok[:, None] & column_ok[None, :]
        p = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for split in range(SPLIT):
            where = (split * size + rows[:, None]) * C + columns[None, :]
            p += tl.load(projected + where, mask, 0.0)
        expert = columns // rank
        if ROUTER:
            gate = spread(found, expert, BLOCK_E)
        else:
            gate = tl.load(gates + rows[:, None] * E + expert[None, :], mask, 0.0).to(tl.float32)
        acc = add_experts(
            acc, (p * gate * scaling).to(dtype), speaker, begin, end, experts, scales, columns,
            column_ok, outs, out_ok, rank, stride_s, stride_e, stride_j, stride_o,
            EBLOCK, SPEAKERS, PRECISION, dtype,
        )  # fmt: skip
    for split in range(SPLIT):
        acc += tl.load(base + (split * size + rows[:, None]) * O + outs[None, :], ok, 0.0)
    if SPEAKERS:
        acc = tl.where(((speaker >= 0) & (speaker < S))[:, None], acc, float("nan"))
    if BIAS:
        acc += tl.load(bias + outs, out_ok, 0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * O + outs[None, :], acc.to(dtype), ok)
