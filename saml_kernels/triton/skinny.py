"""One pass over X (or dY): P = X A^T, gated to H; or dH = s dY B, gated to dP, with dG beside it.

Rows of X go by once for all experts. The epilogue holds whole experts, so that the gate's gradient
dG[m, e] = sum_j P[m, e, j] dH[m, e, j] is a sum within the tile. Where the gates come from a linear
map of the token, its logits are a few columns more of the same pass, and softmax, top-k and the
gate product are the epilogue.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.triton.device import (
    expert_tile,
    gates_of,
    multiply,
    next_speaker,
    rows_of,
    spread,
)

__all__ = ["router_gradient_kernel", "skinny_kernel"]


@triton.jit
def _project(
    acc, logits, x, rows, row_ok, D, s, experts, scales, router,
    columns, wanted, number, E, rank, stride_s, stride_e, stride_j, stride_d,
    EBLOCK: tl.constexpr, ROUTER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc + X A^T and logits + X V^T over the given rows, by A and V of one speaker."""
    dtype: tl.constexpr = x.dtype.element_ty
    for first in range(0, D, BLOCK_D):
        ds = first + tl.arange(0, BLOCK_D)
        d_ok = ds < D
        tile = tl.load(x + rows[:, None] * D + ds[None, :], row_ok[:, None] & d_ok[None, :], 0.0)
        a = expert_tile(
            experts, scales, s, columns, wanted, ds, d_ok, rank,
            stride_s, stride_e, stride_j, stride_d, EBLOCK,
        )  # fmt: skip
        acc = multiply(tile, a.to(dtype).T, acc, PRECISION)
        if ROUTER:
            # A router is E experts of rank 1.
            z = expert_tile(
                router, router, s, number, number < E, ds, d_ok, 1,
                E * D, D, 0, 1, 0,
            )  # fmt: skip
            logits = multiply(tile, z.to(dtype).T, logits, PRECISION)
    return acc, logits


@triton.jit(do_not_specialize=["M", "S"])
def skinny_kernel(
    x, experts, scales, router, gates, speakers,     # [M, D], [S, ...], [S, E, D], [M, E], [M]
    plain, gated, projected, dgates,                 # [M, R] out, [M, R] out, [M, R] in, [M, E] out
    M, D, E, rank, S, gated_stride, scaling, warmth, # warmth: 1 / temperature
    stride_s, stride_e, stride_j, stride_d,          # of the experts
    EBLOCK: tl.constexpr, ROUTER: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BACKWARD: tl.constexpr, SKIP: tl.constexpr, PLAIN: tl.constexpr, DGATES: tl.constexpr,
    SPEAKERS: tl.constexpr, PRECISION: tl.constexpr,
    TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of M, groups of TOGETHER experts).

    Forward stores P (float32, if PLAIN) and s P G; backward (x is dY) stores s dY B G and, if
    DGATES, the gates' gradient. SKIP leaves experts unread that no row of the tile chose. With
    ROUTER the gates are made here, and stored in float32.
    """
    first_m, rows, row_ok, speaker = rows_of(tl.program_id(0), M, speakers, SPEAKERS, BLOCK_M)
    x += first_m * D
    gates += first_m * E
    dgates += first_m * E
    gated += first_m * gated_stride
    group = tl.program_id(1) * TOGETHER
    R = E * rank
    inside = tl.arange(0, BLOCK_R)
    expert = group + inside // rank
    columns = group * rank + inside
    column_ok = (inside < TOGETHER * rank) & (expert < E)
    mask = row_ok[:, None] & column_ok[None, :]
    wanted = column_ok
    number = tl.arange(0, BLOCK_E)
    if not ROUTER:
        gate = tl.load(gates + rows[:, None] * E + expert[None, :], mask, 0.0).to(tl.float32)
        if SKIP:
            wanted = wanted & (tl.max(tl.abs(gate), 0) > 0)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    logits = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if SPEAKERS:
        s = next_speaker(speaker, -1, S)
        while s < S:
            acc, logits = _project(
                acc, logits, x, rows, row_ok & (speaker == s), D, s, experts, scales, router,
                columns, wanted, number, E, rank, stride_s, stride_e, stride_j, stride_d,
                EBLOCK, ROUTER, PRECISION, BLOCK_D,
            )  # fmt: skip
            s = next_speaker(speaker, s, S)
    else:
        acc, logits = _project(
            acc, logits, x, rows, row_ok, D, 0, experts, scales, router,
            columns, wanted, number, E, rank, stride_s, stride_e, stride_j, stride_d,
            EBLOCK, ROUTER, PRECISION, BLOCK_D,
        )  # fmt: skip

    if ROUTER:
        found = gates_of(logits * warmth, E, TOP_K, BLOCK_E)
        if tl.program_id(1) == 0:
            exists = row_ok[:, None] & (number < E)[None, :]
            tl.store(gates + rows[:, None] * E + number[None, :], found, exists)
        gate = spread(found, expert, BLOCK_E)
    where = rows[:, None] * R + columns[None, :]
    if BACKWARD:
        acc = acc * scaling
        if DGATES:
            product = acc * tl.load(projected + first_m * R + where, mask, 0.0)
            for e in tl.static_range(TOGETHER):
                own = tl.sum(tl.where((inside // rank == e)[None, :], product, 0.0), 1)
                at = dgates + rows * E + group + e
                exists = row_ok & (tl.full((BLOCK_M,), e, tl.int32) + group < E)
                tl.store(at, own.to(dgates.dtype.element_ty), exists)
        out = acc * gate
    else:
        if PLAIN:
            tl.store(plain + first_m * R + where, acc, mask)
        out = acc * gate * scaling
    at = gated + rows[:, None] * gated_stride + columns[None, :]
    tl.store(at, out.to(gated.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M"])
def router_gradient_kernel(
    gates, dgates, out,                              # [M, E] each, `out` with its row stride
    M, E, stride, warmth,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Through the softmax: dZ = G (dG - sum_e G dG) / temperature. Grid: (tiles of M,).

    A gate of zero passes nothing on, which makes it the gradient of the top-k softmax too.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    number = tl.arange(0, BLOCK_E)
    mask = (rows < M)[:, None] & (number < E)[None, :]
    g = tl.load(gates + rows[:, None] * E + number[None, :], mask, 0.0)
    dg = tl.load(dgates + rows[:, None] * E + number[None, :], mask, 0.0)
    dz = g * (dg - tl.sum(g * dg, 1)[:, None]) * warmth
    tl.store(out + rows[:, None] * stride + number[None, :], dz.to(out.dtype.element_ty), mask)
