"""What comes back through a layer: dX, and the gradients dP, dZ and dG on the way to it.

    dH = s dY B          dP = dH G          dG[m, e] = sum_j P[m, e, j] dH[m, e, j]
    dZ = G (dG - sum_e G dG) / temperature, the way through a token router's softmax
    dX = dY W + dP A + dZ V

`backward_kernel` is one launch that reads dY for all of it. Work is handed out by tickets, as
forward (tickets.py, single.py): the pieces of a row of tiles are shares of dY B, its other work
shares of dY W. Who arrives last at dY B makes dG, dP and dZ; who arrives last at a tile of dX adds
that tile's shares, waits for dP, and puts dP A and dZ V on top. `finish_backward_kernel` goes on
from [dY W | dY B] as cuBLAS leaves it.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.decode import project_share
from saml_kernels.backends.triton.kernels.device import (
    add_experts,
    base_product,
    gate_tile,
    next_speaker,
    rows_of,
    spread,
)
from saml_kernels.backends.triton.kernels.tickets import arrive, leave, sum_shares, wait, work_of

__all__ = ["backward_kernel", "finish_backward_kernel"]


@triton.jit
def _of_gates(dg, dh, projected, at, mask, expert, E, BLOCK_E: tl.constexpr):
    """dG + the sums over each expert's columns of P dH; `at` says where in `projected`."""
    product = tl.load(projected + at, mask, 0.0) * dh
    number = tl.arange(0, BLOCK_E)
    # No matrix product: in float32 it takes more registers.
    for e in tl.range(tl.min(expert, 0), tl.minimum(tl.max(expert, 0) + 1, E), num_stages=1):
        own = tl.sum(tl.where((expert == e)[None, :], product, 0.0), 1)
        dg += tl.where((number == e)[None, :], own[:, None], 0.0)
    return dg


@triton.jit
def _of_logits(gate, dg, inverse_temperature):
    """Through the softmax. A gate of zero passes nothing on: so it is the top-k softmax's too."""
    return gate * (dg - tl.sum(gate * dg, 1)[:, None]) * inverse_temperature


@triton.jit(
    do_not_specialize=["M", "S", "SHARES", "P_SHARES"],
    do_not_specialize_on_alignment=["gates_span", "speakers_span"],
)
def backward_kernel(
    dy, dx, work, counters, table,                   # [M, N], [M, K] out
    codes, absmax, b, a, router,                     # [S, E, N, r], [S, E, r, K], [S, E, K]
    gates, projected, speakers,                      # [.., E], P [M, R], [..]
    small, dgates,                                   # [M, R (+ E)], [M, E] out
    M, N, K, R, E, rank, S, SHARES, P_SHARES, gates_span, speakers_span,
    scaling, inverse_temperature,
    b_stride_s, b_stride_e, b_stride_j, b_stride_n,
    a_stride_s, a_stride_e, a_stride_j, a_stride_k,
    BITS: tl.constexpr, QBLOCK: tl.constexpr,
    ALIGNED: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr, ROUTER: tl.constexpr, THROUGH: tl.constexpr, DGATES: tl.constexpr,
    DX: tl.constexpr, SPEAKERS: tl.constexpr, ACQUIRE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_PD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of M times (tiles of R times P_SHARES and, with DX, tiles of K times SHARES),).

    THROUGH: dG is made, stored if DGATES, and with ROUTER goes on to dZ, which follows dP in
    `small`. `work`, float32: shares of dY B [P_SHARES, M, R], of dX [SHARES, M, K].
    """
    tiles_m, tiles_o = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_O) if DX else 0
    pieces = tl.cdiv(R, BLOCK_P) * P_SHARES if EXPERTS else 0
    size = M.to(tl.int64)
    C = R + E if ROUTER else R
    arrived = counters + 2
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    row, of_p, work_number = work_of(ticket, tiles_m, pieces, tiles_o * SHARES, GROUP)
    first_m, rows, row_ok, speaker = rows_of(row, M, speakers, speakers_span, SPEAKERS, BLOCK_M)
    mine = dy + first_m * N
    if of_p:
        if EXPERTS:
            share = work_number % P_SHARES
            columns = (work_number // P_SHARES) * BLOCK_P + tl.arange(0, BLOCK_P)
            column_ok = columns < R
            each = tl.cdiv(tl.cdiv(N, BLOCK_PD), P_SHARES)
            last = tl.minimum((share + 1) * each, tl.cdiv(N, BLOCK_PD))
            found = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
            if SPEAKERS:
                s = next_speaker(speaker, -1, S)
                while s < S:
                    found = project_share(
                        found, mine, rows, row_ok & (speaker == s), share * each, last, N, s,
                        b, b, b, columns, column_ok, column_ok, R, E, rank,
                        b_stride_s, b_stride_e, b_stride_j, b_stride_n,
                        0, False, PRECISION, BLOCK_PD,
                    )  # fmt: skip
                    s = next_speaker(speaker, s, S)
            else:
                found = project_share(
                    found, mine, rows, row_ok, share * each, last, N, 0,
                    b, b, b, columns, column_ok, column_ok, R, E, rank,
                    b_stride_s, b_stride_e, b_stride_j, b_stride_n,
                    0, False, PRECISION, BLOCK_PD,
                )  # fmt: skip
            of_share = (share * size + first_m) * R + rows[:, None] * R + columns[None, :]
            tl.store(work + of_share, found, row_ok[:, None] & column_ok[None, :])
            if arrive(arrived + 2 * row) == pieces - 1:
                number = tl.arange(0, BLOCK_E)
                # Small tiles: larger ones beside each other would not fit the registers.
                for q in tl.range(0, BLOCK_M, BLOCK_Q, num_stages=1):
                    q_rows = q + tl.arange(0, BLOCK_Q)
                    q_ok = q_rows < M - first_m
                    gate = gate_tile(gates, first_m, q_rows, q_ok, gates_span, E, BLOCK_E)
                    dg = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
                    for first in tl.range(0, R, BLOCK_P, num_stages=1):
                        of = first + tl.arange(0, BLOCK_P)
                        mask = q_ok[:, None] & (of < R)[None, :]
                        here = q_rows[:, None] * R + of[None, :]
                        dh = sum_shares(work + first_m * R, here, mask, size * R, P_SHARES, 4)
                        dh = dh * scaling
                        if THROUGH:
                            dg = _of_gates(
                                dg, dh, projected + first_m * R, here, mask, of // rank, E, BLOCK_E
                            )  # fmt: skip
                        dp = dh * spread(gate, of // rank, BLOCK_E)
                        of_dp = first_m * C + q_rows[:, None] * C + of[None, :]
                        tl.store(small + of_dp, dp.to(small.dtype.element_ty), mask)
                    exists = q_ok[:, None] & (number < E)[None, :]
                    if DGATES:
                        of_dg = first_m * E + q_rows[:, None] * E + number[None, :]
                        tl.store(dgates + of_dg, dg.to(dgates.dtype.element_ty), exists)
                    if ROUTER:
                        dz = dg
                        if THROUGH:
                            dz = _of_logits(gate, dg, inverse_temperature)
                        of_dz = first_m * C + q_rows[:, None] * C + R + number[None, :]
                        tl.store(small + of_dz, dz.to(small.dtype.element_ty), exists)
                if DX:
                    tl.debug_barrier()
                    tl.atomic_add(arrived + 2 * row + 1, 1, sem="release")
                else:
                    leave(counters, tiles_m, tiles_m)
    else:
        if DX:
            share, tile_o = work_number % SHARES, work_number // SHARES
            first_o = tile_o * BLOCK_O
            outs = first_o + tl.arange(0, BLOCK_O)
            out_ok = outs < K
            ok = row_ok[:, None] & out_ok[None, :]
            of_dx = rows[:, None] * K + outs[None, :]
            steps = tl.cdiv(N, BLOCK_D)
            each = tl.cdiv(steps, SHARES)
            acc = base_product(
                mine, rows, row_ok, codes, absmax, table,
                first_o, out_ok, share * each, tl.minimum((share + 1) * each, steps), N, K,
                True, BITS, QBLOCK, ALIGNED, AFTER, PTX, PRECISION, BLOCK_M, BLOCK_O, BLOCK_D,
            )  # fmt: skip
            counter = arrived + 2 * tiles_m + row * tiles_o + tile_o
            partial = work + size * P_SHARES * R
            complete = SHARES == 1
            if SHARES > 1:
                tl.store(partial + (share * size + first_m) * K + of_dx, acc, ok)
                complete = arrive(counter) == SHARES - 1
            if complete:
                if SHARES > 1:
                    tl.store(counter, 0)
                    acc = sum_shares(partial + first_m * K, of_dx, ok, size * K, SHARES, 4)
                if EXPERTS:
                    wait(arrived + 2 * row + 1, ACQUIRE)
                    small += first_m * C
                    for first in tl.range(0, R, BLOCK_R, num_stages=1):
                        of = first + tl.arange(0, BLOCK_R)
                        wanted = of < R
                        mask = row_ok[:, None] & wanted[None, :]
                        at = rows[:, None] * C + of[None, :]
                        dp = tl.load(small + at, mask, 0.0, cache_modifier=".cg")
                        acc = add_experts(
                            acc, dp, speaker, S, a, a, of, wanted, outs, out_ok, rank,
                            a_stride_s, a_stride_e, a_stride_j, a_stride_k,
                            0, SPEAKERS, PRECISION, small.dtype.element_ty,
                        )  # fmt: skip
                    if ROUTER:
                        # A router is E experts of rank 1.
                        number = tl.arange(0, BLOCK_E)
                        at = rows[:, None] * C + R + number[None, :]
                        exists = row_ok[:, None] & (number < E)[None, :]
                        dz = tl.load(small + at, exists, 0.0, cache_modifier=".cg")
                        acc = add_experts(
                            acc, dz, speaker, S, router, router, number, number < E, outs, out_ok,
                            1, E * K, K, 0, 1, 0, SPEAKERS, PRECISION, small.dtype.element_ty,
                        )  # fmt: skip
                    if SPEAKERS:
                        known = (speaker >= 0) & (speaker < S)
                        acc = tl.where(known[:, None], acc, float("nan"))
                tl.store(dx + first_m * K + of_dx, acc.to(dx.dtype.element_ty), ok)
                leave(counters, tiles_m * tiles_o, tiles_m)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["gates_span"])
def finish_backward_kernel(
    wide, dx, a, router, gates, projected,           # [M, stride], [M, K] out, ..., P [M, R]
    small, dgates,                                   # [M, R (+ E)], [M, E] out
    M, K, E, rank, stride, gates_span,
    scaling, inverse_temperature, stride_e, stride_j, stride_k,
    ROUTER: tl.constexpr, THROUGH: tl.constexpr, DGATES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of K, tiles of M). Rows of `wide` are [dY W | dY B], `stride` apart.

    Each program makes the dP of its rows; those of the first tile of K store it.
    """
    first_m, rows, row_ok, speaker = rows_of(tl.program_id(1), M, wide, 1, False, BLOCK_M)
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    out_ok = outs < K
    ok = row_ok[:, None] & out_ok[None, :]
    R = E * rank
    C = R + E if ROUTER else R
    number = tl.arange(0, BLOCK_E)
    exists = row_ok[:, None] & (number < E)[None, :]
    kept = row_ok & (rows < tl.where(tl.program_id(0) == 0, BLOCK_M, 0))
    dtype: tl.constexpr = small.dtype.element_ty
    wide += first_m * stride
    small += first_m * C
    acc = tl.load(wide + rows[:, None] * stride + outs[None, :], ok, 0.0).to(tl.float32)
    gate = gate_tile(gates, first_m, rows, row_ok, gates_span, E, BLOCK_E)
    dg = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for first in tl.range(0, R, BLOCK_R, num_stages=1):
        of = first + tl.arange(0, BLOCK_R)
        mask = row_ok[:, None] & (of < R)[None, :]
        dh = tl.load(wide + rows[:, None] * stride + K + of[None, :], mask, 0.0)
        dh = dh.to(tl.float32) * scaling
        if THROUGH:
            at = rows[:, None] * R + of[None, :]
            dg = _of_gates(dg, dh, projected + first_m * R, at, mask, of // rank, E, BLOCK_E)
        dp = (dh * spread(gate, of // rank, BLOCK_E)).to(dtype)
        tl.store(small + rows[:, None] * C + of[None, :], dp, kept[:, None] & (of < R)[None, :])
        acc = add_experts(
            acc, dp, speaker, 1, a, a, of, of < R, outs, out_ok, rank,
            0, stride_e, stride_j, stride_k, 0, False, PRECISION, dtype,
        )  # fmt: skip
    if DGATES:
        at = dgates + first_m * E + rows[:, None] * E + number[None, :]
        tl.store(at, dg.to(dgates.dtype.element_ty), exists & kept[:, None])
    if ROUTER:
        dz = _of_logits(gate, dg, inverse_temperature).to(dtype)
        tl.store(small + rows[:, None] * C + R + number[None, :], dz, exists & kept[:, None])
        acc = add_experts(
            acc, dz, speaker, 1, router, router, number, number < E, outs, out_ok,
            1, 0, K, 0, 1, 0, False, PRECISION, dtype,
        )  # fmt: skip
    tl.store(dx + first_m * K + rows[:, None] * K + outs[None, :], acc.to(dx.dtype.element_ty), ok)
