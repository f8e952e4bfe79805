"""The whole forward in one launch, up to a few hundred tokens.

Work is handed out by tickets (tickets.py): the pieces of a row of tiles are shares of
P = X [A ; router]^T, its other work shares of the base product. Who arrives last at P adds its
shares and makes gates and H; who arrives last at a tile of the result adds that tile's shares,
waits for H, and puts experts and bias on top. Shares are added in a fixed order, so the same input
gives the same bits.

`work`, float32: shares of P [P_SHARES, M, C], H [M, R], gates [M, E], shares of Y [SHARES, M, O].
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.decode import project_share
from saml_kernels.backends.triton.kernels.device import (
    add_experts,
    base_product,
    chosen,
    gate_tile,
    gates_of,
    next_speaker,
    rows_of,
    spread,
)
from saml_kernels.backends.triton.kernels.tickets import arrive, leave, sum_shares, wait, work_of

__all__ = ["single_kernel"]


@triton.jit
def _one_of(member, first, second, third, MEMBERS: tl.constexpr):
    """The pointer of a member."""
    if MEMBERS == 1:
        return first
    elif MEMBERS == 2:
        return tl.where(member == 0, first, second)
    else:
        return tl.where(member == 0, first, tl.where(member == 1, second, third))


@triton.jit(
    do_not_specialize=["M", "S", "SHARES", "P_SHARES"],
    do_not_specialize_on_alignment=["gates_span", "speakers_span"],
)
def single_kernel(
    x, y, work, counters, table,                     # [M, D], [MEMBERS, M, O]
    codes, absmax,
    a, a_scales, router, b, b_scales,                # [S, ...], of int8, [S, E, D], [S, ...], int8
    gates, bias, speakers,                           # [.., E], [O], [..]
    plain, made,                                     # P [M, R] and gates [M, E] out, where kept
    codes_1, absmax_1, a_1, router_1, b_1, bias_1,   # of the second member and the third
    codes_2, absmax_2, a_2, router_2, b_2, bias_2,
    M, D, O, R, E, rank, S, SHARES, P_SHARES, gates_span, speakers_span,
    scaling, inverse_temperature,
    a_stride_s, a_stride_e, a_stride_j, a_stride_d,
    b_stride_s, b_stride_e, b_stride_j, b_stride_o,
    BITS: tl.constexpr, QBLOCK: tl.constexpr,
    ALIGNED: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr, A_EBLOCK: tl.constexpr, B_EBLOCK: tl.constexpr, ROUTER: tl.constexpr,
    TOP_K: tl.constexpr, SKIP: tl.constexpr, SPEAKERS: tl.constexpr, BIAS: tl.constexpr,
    ACQUIRE: tl.constexpr, MEMBERS: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_PD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid: (MEMBERS times tiles of M times
    (tiles of [A ; router] times P_SHARES, and tiles of O times SHARES),).

    MEMBERS layers that differ in nothing but their numbers read the same x: their rows of tiles
    come one after the other. SKIP leaves experts unread that no row of the tile chose. KEEP (of one
    member) stores P, and with ROUTER the gates, in float32.
    """
    tiles_m, tiles_o = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O)
    tiles_r = MEMBERS * tiles_m
    steps = tl.cdiv(D, BLOCK_D)
    C = 0
    if EXPERTS:
        C = R + E if ROUTER else R
    pieces = tl.cdiv(C, BLOCK_P) * P_SHARES
    size = M.to(tl.int64)
    own_work = size * (P_SHARES * C + R + E + tl.where(SHARES > 1, SHARES, 0) * O)
    arrived = counters + 2
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    number = tl.arange(0, BLOCK_E)
    row, of_p, work_number = work_of(ticket, tiles_r, pieces, tiles_o * SHARES, GROUP)
    member, tile_m = row // tiles_m, row % tiles_m
    work += member * own_work
    hidden = work + P_SHARES * size * C
    first_m, rows, row_ok, speaker = rows_of(
        tile_m, M, speakers, speakers_span, SPEAKERS, BLOCK_M
    )  # fmt: skip
    gates_at = (made if KEEP and ROUTER else hidden + size * R) + first_m * E
    of_gates = rows[:, None] * E + number[None, :]
    if of_p:
        if EXPERTS:
            a = _one_of(member, a, a_1, a_2, MEMBERS)
            if ROUTER:
                router = _one_of(member, router, router_1, router_2, MEMBERS)
            share = work_number % P_SHARES
            columns = (work_number // P_SHARES) * BLOCK_P + tl.arange(0, BLOCK_P)
            of_expert, of_router = columns < R, (columns >= R) & (columns < C)
            if not ROUTER and not KEEP:
                gate = gate_tile(gates, first_m, rows, row_ok, gates_span, E, BLOCK_E)
                of_expert = of_expert & chosen(gate, columns // rank, BLOCK_E)
            each = tl.cdiv(tl.cdiv(D, BLOCK_PD), P_SHARES)
            last = tl.minimum((share + 1) * each, tl.cdiv(D, BLOCK_PD))
            mine = x + first_m * D
            found = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
            if SPEAKERS:
                s = next_speaker(speaker, -1, S)
                while s < S:
                    found = project_share(
                        found, mine, rows, row_ok & (speaker == s), share * each, last, D, s,
                        a, a_scales, router, columns, of_expert, of_router, R, E, rank,
                        a_stride_s, a_stride_e, a_stride_j, a_stride_d,
                        A_EBLOCK, ROUTER, PRECISION, BLOCK_PD,
                    )  # fmt: skip
                    s = next_speaker(speaker, s, S)
            else:
                found = project_share(
                    found, mine, rows, row_ok, share * each, last, D, 0,
                    a, a_scales, router, columns, of_expert, of_router, R, E, rank,
                    a_stride_s, a_stride_e, a_stride_j, a_stride_d,
                    A_EBLOCK, ROUTER, PRECISION, BLOCK_PD,
                )  # fmt: skip
            p = work + (share * size + first_m) * C + rows[:, None] * C + columns[None, :]
            tl.store(p, found, row_ok[:, None] & (columns < C)[None, :])
            if arrive(arrived + 2 * row) == pieces - 1:
                # A few rows at a time: gates and logits of more would not fit the registers.
                for q in tl.range(0, BLOCK_M, BLOCK_Q, num_stages=1):
                    q_rows = q + tl.arange(0, BLOCK_Q)
                    q_ok = q_rows < M - first_m
                    exists = q_ok[:, None] & (number < E)[None, :]
                    if ROUTER:
                        of_logits = q_rows[:, None] * C + R + number[None, :]
                        logits = sum_shares(
                            work + first_m * C, of_logits, exists, size * C, P_SHARES, 4
                        )  # fmt: skip
                        made_here = gates_of(logits * inverse_temperature, E, TOP_K, BLOCK_E)
                        # Rows that do not exist choose nothing.
                        made_here = tl.where(q_ok[:, None], made_here, 0.0)
                        if SKIP or KEEP:
                            at = q_rows[:, None] * E + number[None, :]
                            tl.store(gates_at + at, made_here, exists)
                    else:
                        made_here = gate_tile(gates, first_m, q_rows, q_ok, gates_span, E, BLOCK_E)
                    for first in tl.range(0, R, BLOCK_R, num_stages=1):
                        of = first + tl.arange(0, BLOCK_R)
                        mask = q_ok[:, None] & (of < R)[None, :]
                        of_p_share = q_rows[:, None] * C + of[None, :]
                        total = sum_shares(
                            work + first_m * C, of_p_share, mask, size * C, P_SHARES, 4
                        )  # fmt: skip
                        of_hidden = first_m * R + q_rows[:, None] * R + of[None, :]
                        if KEEP:
                            tl.store(plain + of_hidden, total, mask)
                        h = total * spread(made_here, of // rank, BLOCK_E) * scaling
                        tl.store(hidden + of_hidden, h, mask)
                tl.debug_barrier()
                tl.atomic_add(arrived + 2 * row + 1, 1, sem="release")
    else:
        share, tile_o = work_number % SHARES, work_number // SHARES
        codes = _one_of(member, codes, codes_1, codes_2, MEMBERS)
        absmax = _one_of(member, absmax, absmax_1, absmax_2, MEMBERS)
        partial = hidden + size * R + size * E
        first_o = tile_o * BLOCK_O
        outs = first_o + tl.arange(0, BLOCK_O)
        out_ok = outs < O
        ok = row_ok[:, None] & out_ok[None, :]
        here = rows[:, None] * O + outs[None, :]
        each = tl.cdiv(steps, SHARES)
        acc = base_product(
            x + first_m * D, rows, row_ok, codes, absmax, table,
            first_o, out_ok, share * each, tl.minimum((share + 1) * each, steps), D, D,
            False, BITS, QBLOCK, ALIGNED, AFTER, PTX, PRECISION, BLOCK_M, BLOCK_O, BLOCK_D,
        )  # fmt: skip
        counter = arrived + 2 * tiles_r + row * tiles_o + tile_o
        complete = SHARES == 1
        if SHARES > 1:
            tl.store(partial + (share * size + first_m) * O + here, acc, ok)
            complete = arrive(counter) == SHARES - 1
        if complete:
            if SHARES > 1:
                tl.store(counter, 0)
                acc = sum_shares(partial + first_m * O, here, ok, size * O, SHARES, 4)
            if EXPERTS:
                dtype: tl.constexpr = y.dtype.element_ty
                b = _one_of(member, b, b_1, b_2, MEMBERS)
                wait(arrived + 2 * row + 1, ACQUIRE)
                if SKIP:
                    if ROUTER:
                        exists = row_ok[:, None] & (number < E)[None, :]
                        gate = tl.load(gates_at + of_gates, exists, 0.0, cache_modifier=".cg")
                    else:
                        gate = gate_tile(gates, first_m, rows, row_ok, gates_span, E, BLOCK_E)
                for first in tl.range(0, R, BLOCK_R, num_stages=1):
                    columns = first + tl.arange(0, BLOCK_R)
                    wanted = columns < R
                    mask = row_ok[:, None] & wanted[None, :]
                    at = first_m * R + rows[:, None] * R + columns[None, :]
                    h = tl.load(hidden + at, mask, 0.0, cache_modifier=".cg").to(dtype)
                    if SKIP:
                        wanted = wanted & chosen(gate, columns // rank, BLOCK_E)
                    acc = add_experts(
                        acc, h, speaker, S, b, b_scales, columns, wanted, outs, out_ok, rank,
                        b_stride_s, b_stride_e, b_stride_j, b_stride_o,
                        B_EBLOCK, SPEAKERS, PRECISION, dtype,
                    )  # fmt: skip
                if SPEAKERS:
                    acc = tl.where(((speaker >= 0) & (speaker < S))[:, None], acc, float("nan"))
            if BIAS:
                bias = _one_of(member, bias, bias_1, bias_2, MEMBERS)
                acc += tl.load(bias + outs, out_ok, 0.0).to(tl.float32)[None, :]
            tl.store(y + (member * size + first_m) * O + here, acc.to(y.dtype.element_ty), ok)
            leave(counters, tiles_r * tiles_o, tiles_r)
