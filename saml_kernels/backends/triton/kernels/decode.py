"""A few tokens in two launches: partial sums of everything that reads X, then everything else.

Decoding is bound by bytes and by launches. `partial_kernel` shares the reduction out among
programs and reads each byte of the weight once; beside it, programs of the same launch project on
the experts and, where there is one, the router. `finish_kernel` adds the shares in a fixed order,
makes gates and H, and puts the experts and the bias on top: on one share as well, which cuBLAS has
made of any number of tokens (stacked.py).
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saml_kernels.backends.triton.kernels.device import (
    add_experts,
    base_product,
    chosen,
    gate_tile,
    gates_of,
    multiply,
    next_speaker,
    projecting_tile,
    rows_of,
    spread,
)

__all__ = ["finish_kernel", "partial_kernel", "project_share"]


@triton.jit
def project_share(
    acc, x, rows, row_ok, first_step, last_step, D, s,
    experts, scales, router, columns, of_expert, of_router, R, E, rank,
    stride_s, stride_e, stride_j, stride_d,
    EBLOCK: tl.constexpr, ROUTER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc + X [A ; router]^T over the given steps and rows, by the experts of one speaker."""
    dtype: tl.constexpr = x.dtype.element_ty
    for step in range(first_step, last_step):
        ds = step * BLOCK_D + tl.arange(0, BLOCK_D)
        d_ok = ds < D
        tile = tl.load(x + rows[:, None] * D + ds[None, :], row_ok[:, None] & d_ok[None, :], 0.0)
        a = projecting_tile(
            experts, scales, router, s, columns, of_expert, of_router, ds, d_ok, D, R, E, rank,
            stride_s, stride_e, stride_j, stride_d, EBLOCK, ROUTER, dtype,
        )  # fmt: skip
        acc = multiply(tile, a.T, acc, PRECISION)
    return acc


@triton.jit(
    do_not_specialize=["M", "S", "SPLIT"],
    do_not_specialize_on_alignment=["gates_span", "speakers_span"],
)
def partial_kernel(
    x, base, projected,                              # [M, D], [SPLIT, M, O], [SPLIT, M, R (+ E)]
    codes, absmax, table,
    experts, scales, router, gates, speakers,        # [S, ...], of int8, [S, E, D], [.., E], [..]
    M, D, O, R, E, rank, S, SPLIT, gates_span, speakers_span,
    stride_s, stride_e, stride_j, stride_d,          # of the experts
    BITS: tl.constexpr, QBLOCK: tl.constexpr,
    ALIGNED: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
    EBLOCK: tl.constexpr, ROUTER: tl.constexpr, SPEAKERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, TRIGGERS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of [A ; router] plus tiles of O, SPLIT, tiles of M).

    Without a router, experts that no row of the tile chose are left unread. TRIGGERS lets a kernel
    that WAITS start as soon as every program of this one has.
    """
    if TRIGGERS:
        gdc_launch_dependents()
    tile, split = tl.program_id(0), tl.program_id(1)
    first_m, rows, row_ok, speaker = rows_of(
        tl.program_id(2), M, speakers, speakers_span, SPEAKERS, BLOCK_M
    )
    steps = tl.cdiv(tl.cdiv(D, BLOCK_D), SPLIT)
    last = tl.minimum((split + 1) * steps, tl.cdiv(D, BLOCK_D))
    C = R + E if ROUTER else R
    tiles_c = tl.cdiv(C, BLOCK_R)
    x += first_m * D
    at = split.to(tl.int64) * M + first_m
    if tile >= tiles_c:
        first_o = (tile - tiles_c) * BLOCK_O
        outs = first_o + tl.arange(0, BLOCK_O)
        acc = base_product(
            x, rows, row_ok, codes, absmax, table,
            first_o, outs < O, split * steps, last, D, D,
            False, BITS, QBLOCK, ALIGNED, AFTER, PTX, PRECISION,
            BLOCK_M, BLOCK_O, BLOCK_D,
        )  # fmt: skip
        y = base + at * O + rows[:, None] * O + outs[None, :]
        tl.store(y, acc, row_ok[:, None] & (outs < O)[None, :])
    else:
        columns = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        of_expert, of_router = columns < R, (columns >= R) & (columns < C)
        if not ROUTER:
            gate = gate_tile(gates, first_m, rows, row_ok, gates_span, E, BLOCK_E)
            of_expert = of_expert & chosen(gate, columns // rank, BLOCK_E)
        found = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if SPEAKERS:
            s = next_speaker(speaker, -1, S)
            while s < S:
                found = project_share(
                    found, x, rows, row_ok & (speaker == s), split * steps, last, D, s,
                    experts, scales, router, columns, of_expert, of_router, R, E, rank,
                    stride_s, stride_e, stride_j, stride_d, EBLOCK, ROUTER, PRECISION, BLOCK_D,
                )  # fmt: skip
                s = next_speaker(speaker, s, S)
        else:
            found = project_share(
                found, x, rows, row_ok, split * steps, last, D, 0,
                experts, scales, router, columns, of_expert, of_router, R, E, rank,
                stride_s, stride_e, stride_j, stride_d, EBLOCK, ROUTER, PRECISION, BLOCK_D,
            )  # fmt: skip
        p = projected + at * C + rows[:, None] * C + columns[None, :]
        tl.store(p, found, row_ok[:, None] & (columns < C)[None, :])


@triton.jit(
    do_not_specialize=["M", "S", "SPLIT"],
    do_not_specialize_on_alignment=["gates_span", "speakers_span"],
)
def finish_kernel(
    base, projected, y,                              # [SPLIT, M, O], [SPLIT, M, R (+ E)], [M, O]
    experts, scales, gates, bias, speakers,          # B, of int8, [.., E], [O], [..]
    plain, made,                                     # P [M, R] and gates [M, E] out, where kept
    M, O, R, E, rank, S, SPLIT, base_stride, projected_stride,
    gates_span, speakers_span, scaling, inverse_temperature,
    stride_s, stride_e, stride_j, stride_o,          # of the experts
    EBLOCK: tl.constexpr, ROUTER: tl.constexpr, TOP_K: tl.constexpr,
    SPEAKERS: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of O, tiles of M). Rows of `base` and `projected` are so far apart.

    WAITS for the kernel before to end, which else the launch does (programmatic dependent launch).
    KEEP: programs of the first tile of O store P, and with ROUTER the gates, in float32.
    """
    if WAITS:
        gdc_wait()
    first_m, rows, row_ok, speaker = rows_of(
        tl.program_id(1), M, speakers, speakers_span, SPEAKERS, BLOCK_M
    )
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    out_ok = outs < O
    dtype: tl.constexpr = y.dtype.element_ty
    size = M.to(tl.int64)
    ok = row_ok[:, None] & out_ok[None, :]
    kept = row_ok & (rows < tl.where(tl.program_id(0) == 0, BLOCK_M, 0))
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    if ROUTER:
        number = tl.arange(0, BLOCK_E)
        exists = row_ok[:, None] & (number < E)[None, :]
        logits = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for split in range(SPLIT):
            share = projected + (split * size + first_m) * projected_stride + R
            of_logits = rows[:, None] * projected_stride + number[None, :]
            logits += tl.load(share + of_logits, exists, 0.0)
        gates_tile = gates_of(logits * inverse_temperature, E, TOP_K, BLOCK_E)
        # Rows that do not exist choose nothing.
        gates_tile = tl.where(row_ok[:, None], gates_tile, 0.0)
        if KEEP:
            of_gates = made + first_m * E + rows[:, None] * E + number[None, :]
            tl.store(of_gates, gates_tile, exists & kept[:, None])
    else:
        gates_tile = gate_tile(gates, first_m, rows, row_ok, gates_span, E, BLOCK_E)
    for first in range(0, R, BLOCK_R):
        columns = first + tl.arange(0, BLOCK_R)
        column_ok = columns < R
        mask = row_ok[:, None] & column_ok[None, :]
        p = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for split in range(SPLIT):
            share = projected + (split * size + first_m) * projected_stride
            p += tl.load(share + rows[:, None] * projected_stride + columns[None, :], mask, 0.0)
        if KEEP:
            of_plain = plain + first_m * R + rows[:, None] * R + columns[None, :]
            tl.store(of_plain, p, kept[:, None] & column_ok[None, :])
        expert = columns // rank
        wanted = column_ok & chosen(gates_tile, expert, BLOCK_E)
        hidden = (p * spread(gates_tile, expert, BLOCK_E) * scaling).to(dtype)
        acc = add_experts(
            acc, hidden, speaker, S, experts, scales, columns,
            wanted, outs, out_ok, rank, stride_s, stride_e, stride_j, stride_o,
            EBLOCK, SPEAKERS, PRECISION, dtype,
        )  # fmt: skip
    for split in range(SPLIT):
        share = base + (split * size + first_m) * base_stride
        acc += tl.load(share + rows[:, None] * base_stride + outs[None, :], ok, 0.0)
    if SPEAKERS:
        acc = tl.where(((speaker >= 0) & (speaker < S))[:, None], acc, float("nan"))
    if BIAS:
        acc += tl.load(bias + outs, out_ok, 0.0).to(tl.float32)[None, :]
    y += first_m * O
    tl.store(y + rows[:, None] * O + outs[None, :], acc.to(dtype), ok)
