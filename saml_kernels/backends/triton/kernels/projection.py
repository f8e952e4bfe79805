"""One pass over X that projects it on the experts: H = s (X A^T) G.

Rows go by once for all experts of a group. Where the gates come from a linear map of the token, its
logits are a few columns more of the same pass, and softmax, top-k and the gate product are the
epilogue.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.device import (
    expert_tile,
    gate_tile,
    gates_of,
    multiply,
    next_speaker,
    rows_of,
    spread,
)

__all__ = ["project_kernel"]


@triton.jit
def _project(
    acc, logits, x, wide, copied, rows, row_ok, D, wide_stride, s, experts, scales, router,
    columns, wanted, number, E, rank, stride_s, stride_e, stride_j, stride_d,
    EBLOCK: tl.constexpr, ROUTER: tl.constexpr, COPY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc + X A^T and logits + X V^T over the given rows, by A and V of one speaker.

    COPY stores the first `copied` columns to `wide` as they go by.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    for first in range(0, D, BLOCK_D):
        ds = first + tl.arange(0, BLOCK_D)
        d_ok = ds < D
        mask = row_ok[:, None] & d_ok[None, :]
        tile = tl.load(x + rows[:, None] * D + ds[None, :], mask, 0.0)
        if COPY:
            at = wide + rows[:, None] * wide_stride + ds[None, :]
            tl.store(at, tile, row_ok[:, None] & (ds < copied)[None, :])
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


@triton.jit(
    do_not_specialize=["M", "S"],
    do_not_specialize_on_alignment=["gates_span", "speakers_span"],
)
def project_kernel(
    x, experts, scales, router, gates, speakers,     # [M, D], [S, ...], of int8, [S, E, D], [.., E]
    plain, gated, wide,                              # [M, R], [M, R], [M, D] out
    M, D, E, rank, S, gated_stride, wide_stride, gates_span, speakers_span,
    scaling, inverse_temperature,
    stride_s, stride_e, stride_j, stride_d,          # of the experts
    EBLOCK: tl.constexpr, ROUTER: tl.constexpr, TOP_K: tl.constexpr, SKIP: tl.constexpr,
    PLAIN: tl.constexpr, COPY: tl.constexpr, PAD: tl.constexpr, SPEAKERS: tl.constexpr,
    PRECISION: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of M, groups of TOGETHER experts).

    Stores P (float32, if PLAIN) and s P G, followed by PAD columns of zeros. SKIP leaves experts
    unread that no row of the tile chose. With ROUTER the gates are made here, and stored in
    float32. COPY stores x to `wide`.
    """
    first_m, rows, row_ok, speaker = rows_of(
        tl.program_id(0), M, speakers, speakers_span, SPEAKERS, BLOCK_M
    )
    x += first_m * D
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
        gates_tile = gate_tile(gates, first_m, rows, row_ok, gates_span, E, BLOCK_E)
        gate = spread(gates_tile, expert, BLOCK_E)
        if SKIP:
            wanted = wanted & (tl.max(tl.abs(gate), 0) > 0)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    logits = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if COPY:
        wide += first_m * wide_stride
    if SPEAKERS:
        s = next_speaker(speaker, -1, S)
        while s < S:
            acc, logits = _project(
                acc, logits, x, wide, 0, rows, row_ok & (speaker == s), D, wide_stride, s,
                experts, scales, router, columns, wanted, number, E, rank,
                stride_s, stride_e, stride_j, stride_d, EBLOCK, ROUTER, False, PRECISION, BLOCK_D,
            )  # fmt: skip
            s = next_speaker(speaker, s, S)
    else:
        acc, logits = _project(
            acc, logits, x, wide, tl.where(group == 0, D, 0), rows, row_ok, D, wide_stride, 0,
            experts, scales, router, columns, wanted, number, E, rank,
            stride_s, stride_e, stride_j, stride_d, EBLOCK, ROUTER, COPY, PRECISION, BLOCK_D,
        )  # fmt: skip

    if ROUTER:
        gates_tile = gates_of(logits * inverse_temperature, E, TOP_K, BLOCK_E)
        if group == 0:
            exists = row_ok[:, None] & (number < E)[None, :]
            at = gates + first_m * E + rows[:, None] * E + number[None, :]
            tl.store(at, gates_tile, exists)
        gate = spread(gates_tile, expert, BLOCK_E)
    if PLAIN:
        tl.store(plain + first_m * R + rows[:, None] * R + columns[None, :], acc, mask)
    at = gated + rows[:, None] * gated_stride + columns[None, :]
    tl.store(at, (acc * gate * scaling).to(gated.dtype.element_ty), mask)
    if PAD > 0:  # noqa: SIM102 - one is known at compile time
        if group == 0:
            at = gated + rows[:, None] * gated_stride + R + number[None, :]
            nothing = tl.zeros((BLOCK_M, BLOCK_E), gated.dtype.element_ty)
            tl.store(at, nothing, row_ok[:, None] & (number < PAD)[None, :])
