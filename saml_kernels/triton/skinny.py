"""One pass over X (or dY): P = X A^T, gated to H; or dH = s dY B, gated to dP, with dG beside it.

Rows of X go by once for all experts. The epilogue holds whole experts, so that the gate's gradient
dG[m, e] = sum_j P[m, e, j] dH[m, e, j] is a sum within the tile.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.triton.device import expert_tile, multiply, rows_of, speaker_range

__all__ = ["skinny_kernel"]


@triton.jit(do_not_specialize=["M", "S"])
def skinny_kernel(
    x, experts, gates, speakers,                     # [M, D], [S, ...], [M, E], [M]
    plain, gated, projected, dgates,                 # [M, R] out, [M, R] out, [M, R] in, [M, E] out
    M, D, E, rank, S, gated_stride, scaling,
    stride_s, stride_e, stride_j, stride_d,          # of the experts
    BACKWARD: tl.constexpr, SKIP: tl.constexpr, PLAIN: tl.constexpr, DGATES: tl.constexpr,
    SPEAKERS: tl.constexpr, PRECISION: tl.constexpr,
    TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of M, groups of TOGETHER experts).

    Forward stores P (float32, if PLAIN) and s P G; backward (x is dY) stores s dY B G and, if
    DGATES, the gates' gradient. SKIP leaves experts unread that no row of the tile chose.
    """
    rows, row_ok, speaker = rows_of(tl.program_id(0), M, speakers, S, SPEAKERS, BLOCK_M)
    begin, end = speaker_range(speaker, S, SPEAKERS)
    group = tl.program_id(1) * TOGETHER
    inside = tl.arange(0, BLOCK_R)
    expert = group + inside // rank
    columns = group * rank + inside
    column_ok = (inside < TOGETHER * rank) & (expert < E)
    mask = row_ok[:, None] & column_ok[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    gate = tl.load(gates + rows[:, None] * E + expert[None, :], mask, 0.0).to(tl.float32)
    wanted = column_ok
    if SKIP:
        wanted = wanted & (tl.max(tl.abs(gate), 0) > 0)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, D, BLOCK_D):
        ds = first + tl.arange(0, BLOCK_D)
        d_ok = ds < D
        tile = tl.load(x + rows[:, None] * D + ds[None, :], row_ok[:, None] & d_ok[None, :], 0.0)
        for s in range(begin, end):
            mine = tl.where(speaker[:, None] == s, tile, 0.0) if SPEAKERS else tile
            a = expert_tile(
                experts, s, columns, wanted, ds, d_ok, rank,
                stride_s, stride_e, stride_j, stride_d,
            )  # fmt: skip
            acc = multiply(mine.to(dtype), a.to(dtype).T, acc, PRECISION)

    R = E * rank
    where = rows[:, None] * R + columns[None, :]
    if BACKWARD:
        acc = acc * scaling
        if DGATES:
            product = acc * tl.load(projected + where, mask, 0.0)
            for e in tl.static_range(TOGETHER):
                own = tl.sum(tl.where((inside // rank == e)[None, :], product, 0.0), 1)
                at = dgates + rows * E + group + e
                exists = row_ok & (tl.full((BLOCK_M,), e, tl.int32) + group < E)
                tl.store(at, own.to(dgates.dtype.element_ty), exists)
        out = acc * gate
    else:
        if PLAIN:
            tl.store(plain + where, acc, mask)
        out = acc * gate * scaling
    at = gated + rows[:, None] * gated_stride + columns[None, :]
    tl.store(at, out.to(gated.dtype.element_ty), mask)
