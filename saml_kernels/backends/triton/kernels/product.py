"""The base product with the experts in its accumulator: Y = X W^T + H B^T + bias.

After the weight's last tile the loop goes on over [H | B] with the accumulator still in registers
(as a prologue they would be the first terms of the same sum). With SPLIT > 1 each program takes a
share of the reduction and writes float32 partial sums, which `reduce_kernel` adds in a fixed order.
`persistent_kernel` is the same product of a dense weight for devices with a tensor memory
accelerator, which copies whole tiles.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.device import (
    add_experts,
    base_product,
    chosen,
    gate_tile,
    multiply,
    position,
    rows_of,
)

__all__ = ["persistent_kernel", "product_kernel", "reduce_kernel"]


@triton.jit
def _store_result(
    acc, y, bias, first_m, rows, row_ok, outs, out_ok, O, BIAS: tl.constexpr,
):  # fmt: skip
    """A tile of the result, the bias on top; rows are counted from `first_m`."""
    if BIAS:
        acc += tl.load(bias + outs, out_ok, 0.0).to(tl.float32)[None, :]
    y += first_m * O
    mask = row_ok[:, None] & out_ok[None, :]
    tl.store(y + rows[:, None] * O + outs[None, :], acc.to(y.dtype.element_ty), mask)


@triton.jit(
    do_not_specialize=["M", "S", "SPLIT"],
    do_not_specialize_on_alignment=["gates_span", "speakers_span"],
)
def product_kernel(
    x, y,                                            # [M, D] in, [SPLIT, M, O] out
    codes, absmax, table,
    hidden, experts, scales,                         # [M, R], [S, ...], of int8
    gates, bias, speakers,                           # [.., E], [O], [..]
    M, D, O, R, E, rank, S, SPLIT, hidden_stride, gates_span, speakers_span,
    stride_s, stride_e, stride_j, stride_o,          # of the experts
    BITS: tl.constexpr, QBLOCK: tl.constexpr,
    ALIGNED: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr, EBLOCK: tl.constexpr, SKIP: tl.constexpr, SPEAKERS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of M times tiles of O, SPLIT).

    SKIP leaves experts unread that no row of the tile chose.
    """
    tiles_m, tiles_o = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O)
    pid_m, pid_o = position(tl.program_id(0), tiles_m, tiles_o, GROUP)
    split = tl.program_id(1)
    first_m, rows, row_ok, speaker = rows_of(
        pid_m, M, speakers, speakers_span, SPEAKERS, BLOCK_M
    )  # fmt: skip
    first_o = pid_o * BLOCK_O
    outs = first_o + tl.arange(0, BLOCK_O)
    out_ok = outs < O
    steps = tl.cdiv(tl.cdiv(D, BLOCK_D), SPLIT)
    last = tl.minimum((split + 1) * steps, tl.cdiv(D, BLOCK_D))
    dtype: tl.constexpr = x.dtype.element_ty
    x += first_m * D
    acc = base_product(
        x, rows, row_ok, codes, absmax, table,
        first_o, out_ok, split * steps, last, D, D,
        False, BITS, QBLOCK, ALIGNED, AFTER, PTX, PRECISION,
        BLOCK_M, BLOCK_O, BLOCK_D,
    )  # fmt: skip

    if EXPERTS and split == SPLIT - 1:
        hidden += first_m * hidden_stride
        if SKIP:
            gate = gate_tile(gates, first_m, rows, row_ok, gates_span, E, BLOCK_E)
        for first_r in range(0, R, BLOCK_R):
            columns = first_r + tl.arange(0, BLOCK_R)
            wanted = columns < R
            mask = row_ok[:, None] & wanted[None, :]
            if SKIP:
                wanted = wanted & chosen(gate, columns // rank, BLOCK_E)
            h = tl.load(hidden + rows[:, None] * hidden_stride + columns[None, :], mask, 0.0)
            acc = add_experts(
                acc, h, speaker, S, experts, scales, columns, wanted, outs, out_ok,
                rank, stride_s, stride_e, stride_j, stride_o,
                EBLOCK, SPEAKERS, PRECISION, dtype,
            )  # fmt: skip
    if SPEAKERS:
        known = (speaker >= 0) & (speaker < S)
        acc = tl.where(known[:, None], acc, float("nan"))
    first = split.to(tl.int64) * M + first_m
    _store_result(acc, y, bias, first, rows, row_ok, outs, out_ok, O, BIAS)


@triton.jit(do_not_specialize=["M"])
def persistent_kernel(
    x, y, wide, hidden, bias,                        # [M, D], [M, O] out, [O, D + C], [M, C], [O]
    M, D, O,
    C: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Y = [X | H] [W | B]^T + bias. Grid: (programs,), each of which goes from tile to tile.

    Every factor is read by tensor descriptors, which hand out zeros beyond its edges: D and C, the
    columns of H and of B (0: there are none; BLOCK_C at most), are multiples of 8. FLAT makes one
    loop of those over tiles and over the reduction: the next tile is copied while one is stored.
    """
    tiles_m, tiles_o = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O)
    of_x = tl.make_tensor_descriptor(x, [M, D], [D, 1], [BLOCK_M, BLOCK_D])
    of_w = tl.make_tensor_descriptor(wide, [O, D], [D + C, 1], [BLOCK_O, BLOCK_D])
    if C > 0:
        of_h = tl.make_tensor_descriptor(hidden, [M, C], [C, 1], [BLOCK_M, BLOCK_C])
        of_b = tl.make_tensor_descriptor(wide + D, [O, C], [D + C, 1], [BLOCK_O, BLOCK_C])
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_o, tl.num_programs(0), flatten=FLAT):
        pid_m, pid_o = position(tile, tiles_m, tiles_o, GROUP)
        at_m, at_o = pid_m * BLOCK_M, pid_o * BLOCK_O
        acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for at in range(0, D, BLOCK_D):
            acc = multiply(of_x.load([at_m, at]), of_w.load([at_o, at]).T, acc, PRECISION)
        if C > 0:
            acc = multiply(of_h.load([at_m, 0]), of_b.load([at_o, 0]).T, acc, PRECISION)
        first_m, rows, row_ok, _ = rows_of(pid_m, M, bias, 1, False, BLOCK_M)
        outs = at_o + tl.arange(0, BLOCK_O)
        _store_result(acc, y, bias, first_m, rows, row_ok, outs, outs < O, O, BIAS)


@triton.jit(do_not_specialize=["M", "SPLIT"])
def reduce_kernel(
    partial, y, bias, M, O, SPLIT,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [M, O] = sum over splits of partial [SPLIT, M, O] + bias [O], always in the same order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = M.to(tl.int64) * O
    ok = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT):
        total += tl.load(partial + split * size + at, ok, 0.0)
    if BIAS:
        total += tl.load(bias + at % O, ok, 0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), ok)
