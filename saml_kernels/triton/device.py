"""Device functions that the kernels share: tiles of the weight and of the experts, gates."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "add_experts",
    "base_product",
    "expert_tile",
    "gates_of",
    "multiply",
    "position",
    "rows_of",
    "speaker_range",
    "spread",
    "weight_tile",
]


@triton.jit
def position(tile, tiles_m, tiles_o, GROUP: tl.constexpr):
    """Tile number -> (row of tiles, column of tiles), GROUP rows side by side for the L2 cache."""
    width = GROUP * tiles_o
    first = (tile // width) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + (tile % width) % height, (tile % width) // height


@triton.jit
def rows_of(pid_m, M, speakers, S, SPEAKERS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of a tile, which of them exist, and whose they are (0 where there is one speaker)."""
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < M
    if SPEAKERS:
        speaker = tl.load(speakers + rows, mask=row_ok, other=-1)
    else:
        speaker = tl.zeros((BLOCK_M,), tl.int32)
    return rows, row_ok, speaker


@triton.jit
def speaker_range(speaker, S, SPEAKERS: tl.constexpr):
    """First speaker among a tile's rows, and one past the last; indices out of range left out."""
    if SPEAKERS:
        known = (speaker >= 0) & (speaker < S)
        first = tl.min(tl.where(known, speaker, S), 0)
        last = tl.max(tl.where(known, speaker, -1), 0)
        return first, last + 1
    else:
        return 0, 1


@triton.jit
def _scales(block, absmax, nested, nested_code, offset, mask, NESTED: tl.constexpr):
    """float32 scales of blocks; double-quantised ones are read as they lie."""
    if NESTED:
        code = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        outer = tl.load(nested + block // 256, mask=mask, other=0.0)
        return tl.load(nested_code + code) * outer + tl.load(offset)
    else:
        return tl.load(absmax + block, mask=mask, other=0.0)


@triton.jit
def weight_tile(
    codes, absmax, nested, nested_code, offset, table,  # the quantised weight, rows of `width`
    rows, row_ok, first, width,
    BLOCK: tl.constexpr, QBLOCK: tl.constexpr, BITS: tl.constexpr, NESTED: tl.constexpr,
    ALIGNED: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Columns first .. first + BLOCK of the given rows, dequantised: [len(rows), BLOCK] in DTYPE.

    Code times scale in float32, then one rounding to DTYPE. By permutes (PTX), 16-bit types look
    the code up in float16 first (at most 2^-12 relative); without, and in float32, it is exact.
    ALIGNED says that QBLOCK divides the width and BLOCK divides QBLOCK, so that a row of the tile
    lies whole in one block; anything else goes element by element.
    """
    if BITS == 16:  # a dense scratch of this width, no scales
        cols = first + tl.arange(0, BLOCK)
        mask = row_ok[:, None] & (cols < width)[None, :]
        w = tl.load(codes + rows[:, None] * width + cols[None, :], mask=mask, other=0.0)
        return w.to(DTYPE)
    elif ALIGNED:
        if BITS == 8:
            cols = first + tl.arange(0, BLOCK)
            c = tl.load(
                codes + rows[:, None] * width + cols[None, :], mask=row_ok[:, None], other=0
            )
            w = c.to(tl.float32) * (1.0 / 127)
        else:
            pairs = first // 2 + tl.arange(0, BLOCK // 2)
            where = rows[:, None] * (width // 2) + pairs[None, :]
            packed = tl.load(codes + where, mask=row_ok[:, None], other=0)
            if PTX == "":
                high = tl.load(table + (packed >> 4).to(tl.int32))
                low = tl.load(table + (packed & 15).to(tl.int32))
            elif tl.float32 == DTYPE:
                high, low = tl.inline_asm_elementwise(
                    PTX, "=r,=r,=r,=r,=r,=r,=r,=r,r", [packed],
                    dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
                )  # fmt: skip
            else:
                high, low = tl.inline_asm_elementwise(
                    PTX, "=r,=r,=r,=r,r", [packed],
                    dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
                )  # fmt: skip
            w = tl.interleave(high, low).to(tl.float32)
        block = rows * (width // QBLOCK) + first // QBLOCK
        scale = _scales(block, absmax, nested, nested_code, offset, row_ok, NESTED)
        return (w * scale[:, None]).to(DTYPE)
    else:
        cols = first + tl.arange(0, BLOCK)
        mask = row_ok[:, None] & (cols < width)[None, :]
        index = rows[:, None] * width + cols[None, :]
        if BITS == 8:
            w = tl.load(codes + index, mask=mask, other=0).to(tl.float32) * (1.0 / 127)
        else:
            packed = tl.load(codes + index // 2, mask=mask, other=0).to(tl.int32)
            code = tl.where(index % 2 == 0, packed >> 4, packed & 15)
            w = tl.load(table + code)
        scale = _scales(index // QBLOCK, absmax, nested, nested_code, offset, mask, NESTED)
        return tl.where(mask, w * scale, 0.0).to(DTYPE)


@triton.jit
def expert_tile(
    matrix, scales, speaker, columns, column_ok, others, other_ok, rank,
    stride_s, stride_e, stride_j, stride_o, EBLOCK: tl.constexpr,
):  # fmt: skip
    """One speaker's stacked experts: [len(columns), len(others)].

    A column c is expert c // rank, direction c % rank; `others` runs over in- or out-features.
    With EBLOCK > 0 they are int8, with a float32 scale for each EBLOCK elements as they lie.
    """
    expert, direction = columns // rank, columns % rank
    base = (tl.zeros((), tl.int64) + speaker) * stride_s
    at = expert.to(tl.int64) * stride_e + direction.to(tl.int64) * stride_j
    where = base + at[:, None] + others.to(tl.int64)[None, :] * stride_o
    mask = column_ok[:, None] & other_ok[None, :]
    found = tl.load(matrix + where, mask=mask, other=0)
    if EBLOCK > 0:
        scale = tl.load(scales + where // EBLOCK, mask=mask, other=0.0)
        found = found.to(tl.float32) * (1.0 / 127) * scale
    return found


@triton.jit
def multiply(left, right, acc, PRECISION: tl.constexpr):
    """acc + left right, accumulated in float32."""
    if PRECISION == "emulated":  # the interpreter's product takes bfloat16 for plain integers
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc)
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def gates_of(logits, E, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr):
    """Softmax of [BLOCK_M, BLOCK_E] over the first E, or over the TOP_K largest of them.

    Of equal logits the first is larger. TOP_K = 0 keeps all.
    """
    number = tl.arange(0, BLOCK_E)
    kept = tl.where((number < E)[None, :], logits, float("-inf"))
    if TOP_K > 0:
        left = kept
        kept = tl.full(logits.shape, float("-inf"), tl.float32)
        for _ in tl.static_range(TOP_K):
            largest = number[None, :] == tl.argmax(left, 1)[:, None]
            kept = tl.where(largest, left, kept)
            left = tl.where(largest, float("-inf"), left)
    weight = tl.exp(kept - tl.max(kept, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def spread(gates, expert, BLOCK_E: tl.constexpr):
    """gates[:, expert]: [BLOCK_M, BLOCK_E] and [BLOCK_R] -> [BLOCK_M, BLOCK_R], exactly."""
    mine = tl.arange(0, BLOCK_E)[:, None] == expert[None, :]
    return tl.dot(gates, mine.to(tl.float32), input_precision="ieee")


@triton.jit
def base_product(
    x, rows, row_ok, codes, absmax, nested, nested_code, offset, table,
    first_o, outs, out_ok, first_step, last_step, D, width,
    TRANSPOSED: tl.constexpr, BITS: tl.constexpr, QBLOCK: tl.constexpr, NESTED: tl.constexpr,
    ALIGNED: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Steps first_step .. last_step of X W^T (or X W, TRANSPOSED): float32 [BLOCK_M, BLOCK_O]."""
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for step in range(first_step, last_step):
        first_d = step * BLOCK_D
        ds = first_d + tl.arange(0, BLOCK_D)
        d_ok = ds < D
        # [BLOCK_M, BLOCK_D]
        tile = tl.load(x + rows[:, None] * D + ds[None, :], row_ok[:, None] & d_ok[None, :], 0.0)
        if TRANSPOSED:
            # [BLOCK_D, BLOCK_O]
            w = weight_tile(
                codes, absmax, nested, nested_code, offset, table,
                ds.to(tl.int64), d_ok, first_o, width,
                BLOCK_O, QBLOCK, BITS, NESTED, ALIGNED, PTX, dtype,
            )  # fmt: skip
        else:
            # [BLOCK_O, BLOCK_D] -> [BLOCK_D, BLOCK_O]
            w = weight_tile(
                codes, absmax, nested, nested_code, offset, table,
                outs.to(tl.int64), out_ok, first_d, width,
                BLOCK_D, QBLOCK, BITS, NESTED, ALIGNED, PTX, dtype,
            ).T  # fmt: skip
        acc = multiply(tile, w, acc, PRECISION)
    return acc


@triton.jit
def add_experts(
    acc, h, speaker, begin, end, experts, scales, columns, column_ok, outs, out_ok, rank,
    stride_s, stride_e, stride_j, stride_o,
    EBLOCK: tl.constexpr, SPEAKERS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + H B^T over the given columns, each row by its own speaker's experts.

    What no row of this tile chose is not read.
    """
    for s in range(begin, end):
        mine = tl.where(speaker[:, None] == s, h, 0.0) if SPEAKERS else h
        chosen = column_ok & (tl.max(tl.abs(mine.to(tl.float32)), 0) > 0)
        b = expert_tile(
            experts, scales, s, columns, chosen, outs, out_ok, rank,
            stride_s, stride_e, stride_j, stride_o, EBLOCK,
        )  # fmt: skip
        acc = multiply(mine.to(DTYPE), b.to(DTYPE), acc, PRECISION)
    return acc
