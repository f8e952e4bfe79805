"""Device functions that the kernels share: tiles of the weight and of the experts, gates."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "add_experts",
    "base_product",
    "chosen",
    "expert_tile",
    "gate_tile",
    "gates_of",
    "multiply",
    "next_speaker",
    "position",
    "projecting_tile",
    "rows_of",
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
def rows_of(pid_m, M, speakers, span, SPEAKERS: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's first row (int64), its rows from there on, which exist, and whose they are.

    `span` rows share an entry of `speakers`. Offsets are kept in two parts everywhere: what may
    pass 2^31 in a scalar, the rest in int32.
    """
    first = pid_m.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < M - first
    if SPEAKERS:
        speaker = tl.load(speakers + (first + rows) // span, mask=row_ok, other=-1)
    else:
        speaker = tl.zeros((BLOCK_M,), tl.int32)
    return first, rows, row_ok, speaker


@triton.jit
def next_speaker(speaker, last, S):
    """The least speaker among a tile's rows that comes after `last`; S where there is none.

    A loop from next_speaker(speaker, -1, S) meets each speaker of the tile once, and no index that
    is out of range.
    """
    return tl.min(tl.where((speaker > last) & (speaker < S), speaker, S), 0)


@triton.jit
def coded_tile(
    codes, absmax, table,  # the quantised weight, rows of `width`
    first_row, rows, row_ok, first, width,
    BLOCK: tl.constexpr, QBLOCK: tl.constexpr, BITS: tl.constexpr,
    PTX: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Columns first .. first + BLOCK of rows: values [len(rows), BLOCK], and their float32 scales.

    The rows are counted from `first_row`. QBLOCK divides the width. Where BLOCK divides QBLOCK, a
    row of the tile lies whole in one block and scales are [len(rows)]; else QBLOCK divides BLOCK,
    scales are [len(rows), BLOCK / QBLOCK], and columns past the width are zero. INT8 values are the
    codes themselves in float32; others lie in -1..1, float32 (by memory, where PTX is empty) or
    VALUE (by permutes).
    """
    WIDE: tl.constexpr = BLOCK > QBLOCK
    if BITS == 8:
        cols = first + tl.arange(0, BLOCK)
        codes += tl.cast(first_row, tl.int64) * width
        where = rows[:, None] * width + cols[None, :]
        mask = row_ok[:, None] & (cols < width)[None, :] if WIDE else row_ok[:, None]
        values = tl.load(codes + where, mask=mask, other=0).to(tl.float32)
    else:
        pairs = first // 2 + tl.arange(0, BLOCK // 2)
        half = tl.multiple_of(width // 2, 16)
        codes += tl.cast(first_row, tl.int64) * half
        where = rows[:, None] * half + pairs[None, :]
        mask = row_ok[:, None] & (pairs < half)[None, :] if WIDE else row_ok[:, None]
        packed = tl.load(codes + where, mask=mask, other=0)
        if PTX == "":
            high = tl.load(table + (packed >> 4).to(tl.int32))
            low = tl.load(table + (packed & 15).to(tl.int32))
        elif tl.float32 == VALUE:
            high, low = tl.inline_asm_elementwise(
                PTX, "=r,=r,=r,=r,=r,=r,=r,=r,r", [packed],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            high, low = tl.inline_asm_elementwise(
                PTX, "=r,=r,=r,=r,r", [packed], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
            )
        values = tl.interleave(high, low)
        if PTX != "":
            values = values.to(VALUE, bitcast=True)
    # 2^31 blocks are 2^36 weights and more.
    blocks = width // QBLOCK
    block = (first_row + rows) * blocks + first // QBLOCK
    if WIDE:
        number = tl.arange(0, BLOCK // QBLOCK)
        inside = row_ok[:, None] & (first // QBLOCK + number < blocks)[None, :]
        scale = tl.load(absmax + block[:, None] + number[None, :], mask=inside, other=0.0)
    else:
        scale = tl.load(absmax + block, mask=row_ok, other=0.0)
    if BITS == 8:
        scale = scale * (1.0 / 127)
    return values, scale


@triton.jit
def weight_tile(
    codes, absmax, table,  # the quantised weight, rows of `width`
    first_row, rows, row_ok, first, width,
    BLOCK: tl.constexpr, QBLOCK: tl.constexpr, BITS: tl.constexpr,
    ALIGNED: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Columns first .. first + BLOCK of rows, dequantised: [len(rows), BLOCK] in DTYPE.

    The rows are counted from `first_row`. Code times scale in float32, then one rounding to DTYPE.
    By permutes (PTX), 16-bit types look the code up in float16 first (at most 2^-12 relative);
    without, and in float32, it is exact.
    ALIGNED says that `coded_tile` may be used; anything else goes element by element.
    """
    if BITS == 16:  # a dense scratch of this width, no scales
        cols = first + tl.arange(0, BLOCK)
        mask = row_ok[:, None] & (cols < width)[None, :]
        codes += tl.cast(first_row, tl.int64) * width
        w = tl.load(codes + rows[:, None] * width + cols[None, :], mask=mask, other=0.0)
        return w.to(DTYPE)
    elif ALIGNED:
        value: tl.constexpr = DTYPE if tl.float32 == DTYPE else tl.float16
        w, scale = coded_tile(
            codes, absmax, table,
            first_row, rows, row_ok, first, width,
            BLOCK, QBLOCK, BITS, PTX, value,
        )  # fmt: skip
        if BLOCK > QBLOCK:
            apart = tl.reshape(w.to(tl.float32), (w.shape[0], BLOCK // QBLOCK, QBLOCK))
            return tl.reshape((apart * scale[:, :, None]).to(DTYPE), (w.shape[0], BLOCK))
        else:
            return (w.to(tl.float32) * scale[:, None]).to(DTYPE)
    else:
        cols = first + tl.arange(0, BLOCK)
        mask = row_ok[:, None] & (cols < width)[None, :]
        index = (tl.cast(first_row, tl.int64) + rows)[:, None] * width + cols[None, :]
        if BITS == 8:
            w = tl.load(codes + index, mask=mask, other=0).to(tl.float32) * (1.0 / 127)
        else:
            packed = tl.load(codes + index // 2, mask=mask, other=0).to(tl.int32)
            code = tl.where(index % 2 == 0, packed >> 4, packed & 15)
            w = tl.load(table + code)
        scale = tl.load(absmax + index // QBLOCK, mask=mask, other=0.0)
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
    first = (tl.zeros((), tl.int64) + speaker) * stride_s
    at = expert * stride_e + direction * stride_j
    where = at[:, None] + others[None, :] * stride_o
    mask = column_ok[:, None] & other_ok[None, :]
    tile = tl.load(matrix + first + where, mask=mask, other=0)
    if EBLOCK > 0:
        scale = tl.load(scales + (first + where) // EBLOCK, mask=mask, other=0.0)
        tile = tile.to(tl.float32) * (1.0 / 127) * scale
    return tile


@triton.jit
def projecting_tile(
    experts, scales, router, speaker, columns, of_expert, of_router, ds, d_ok, D, R, E, rank,
    stride_s, stride_e, stride_j, stride_d,
    EBLOCK: tl.constexpr, ROUTER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One speaker's rows of [A ; router], as `of_expert` and `of_router` say: [len(columns),
    len(ds)] in DTYPE.
    """
    tile = expert_tile(
        experts, scales, speaker, columns, of_expert, ds, d_ok, rank,
        stride_s, stride_e, stride_j, stride_d, EBLOCK,
    ).to(DTYPE)  # fmt: skip
    if ROUTER:
        # A router is E experts of rank 1.
        z = expert_tile(
            router, router, speaker, columns - R, of_router, ds, d_ok, 1,
            E * D, D, 0, 1, 0,
        )  # fmt: skip
        tile = tl.where(of_router[:, None], z.to(DTYPE), tile)
    return tile


@triton.jit
def multiply(left, right, acc, PRECISION: tl.constexpr):
    """acc + left right, accumulated in float32."""
    if PRECISION == "emulated":  # the interpreter's product takes bfloat16 for plain integers
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc)
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def gate_tile(gates, first_m, rows, row_ok, span, E, BLOCK_E: tl.constexpr):
    """The gates of a tile's rows, float32 [BLOCK_M, BLOCK_E], zero beyond E.

    `span` rows share a row of `gates` [.., E].
    """
    number = tl.arange(0, BLOCK_E)
    at = ((first_m + rows) // span)[:, None] * E + number[None, :]
    tile = tl.load(gates + at, mask=row_ok[:, None] & (number < E)[None, :], other=0.0)
    return tile.to(tl.float32)


@triton.jit
def chosen(gates, expert, BLOCK_E: tl.constexpr):
    """Whether some row of a tile of gates [BLOCK_M, BLOCK_E] chose each of `expert` [n]: [n]."""
    used = tl.max(tl.abs(gates), 0)
    mine = tl.arange(0, BLOCK_E)[:, None] == expert[None, :]
    return tl.max(tl.where(mine, used[:, None], 0.0), 0) > 0


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
    x, rows, row_ok, codes, absmax, table,
    first_o, out_ok, first_step, last_step, D, width,
    TRANSPOSED: tl.constexpr, BITS: tl.constexpr, QBLOCK: tl.constexpr,
    ALIGNED: tl.constexpr, AFTER: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Steps first_step .. last_step of X W^T (or X W, TRANSPOSED): float32 [BLOCK_M, BLOCK_O].

    x points at the row that `rows` are counted from; the result's columns begin at `first_o`.
    AFTER (where ALIGNED, and not TRANSPOSED, where scales run along the reduction): the codes are
    rounded to the type of x (exact for INT8 and float32, 2^-12 relative in float16, 2^-9 in
    bfloat16), and the scale of a block goes on its float32 sum; code times scale is not rounded.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for step in range(first_step, last_step):
        first_d = step * BLOCK_D
        inside = tl.arange(0, BLOCK_D)
        ds = first_d + inside
        d_ok = ds < D
        # [BLOCK_M, BLOCK_D]
        tile = tl.load(x + rows[:, None] * D + ds[None, :], row_ok[:, None] & d_ok[None, :], 0.0)
        if AFTER:
            # [BLOCK_O, BLOCK_D], [BLOCK_O]
            w, scale = coded_tile(
                codes, absmax, table,
                first_o, tl.arange(0, BLOCK_O), out_ok, first_d, width,
                BLOCK_D, QBLOCK, BITS, PTX, dtype,
            )  # fmt: skip
            part = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
            acc += multiply(tile, w.to(dtype).T, part, PRECISION) * scale[None, :]
        elif TRANSPOSED:
            # [BLOCK_D, BLOCK_O]
            w = weight_tile(
                codes, absmax, table,
                first_d, inside, d_ok, first_o, width,
                BLOCK_O, QBLOCK, BITS, ALIGNED, PTX, dtype,
            )  # fmt: skip
            acc = multiply(tile, w, acc, PRECISION)
        else:
            # [BLOCK_O, BLOCK_D] -> [BLOCK_D, BLOCK_O]
            w = weight_tile(
                codes, absmax, table,
                first_o, tl.arange(0, BLOCK_O), out_ok, first_d, width,
                BLOCK_D, QBLOCK, BITS, ALIGNED, PTX, dtype,
            )  # fmt: skip
            acc = multiply(tile, w.T, acc, PRECISION)
    return acc


@triton.jit
def _add_own(
    acc, h, s, experts, scales, columns, wanted, outs, out_ok, rank,
    stride_s, stride_e, stride_j, stride_o,
    EBLOCK: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    b = expert_tile(
        experts, scales, s, columns, wanted, outs, out_ok, rank,
        stride_s, stride_e, stride_j, stride_o, EBLOCK,
    )  # fmt: skip
    return multiply(h.to(DTYPE), b.to(DTYPE), acc, PRECISION)


@triton.jit
def add_experts(
    acc, h, speaker, S, experts, scales, columns, wanted, outs, out_ok, rank,
    stride_s, stride_e, stride_j, stride_o,
    EBLOCK: tl.constexpr, SPEAKERS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + H B^T over the given columns, each row by its own speaker's experts.

    Columns that are not `wanted` are not read. What says so must not come from `h`: a loop that
    loads `h` for both would be pipelined with too few buffers for it.
    """
    if SPEAKERS:
        s = next_speaker(speaker, -1, S)
        while s < S:
            acc = _add_own(
                acc, tl.where(speaker[:, None] == s, h, 0.0), s, experts, scales,
                columns, wanted, outs, out_ok, rank, stride_s, stride_e, stride_j, stride_o,
                EBLOCK, PRECISION, DTYPE,
            )  # fmt: skip
            s = next_speaker(speaker, s, S)
        return acc
    else:
        return _add_own(
            acc, h, 0, experts, scales,
            columns, wanted, outs, out_ok, rank, stride_s, stride_e, stride_j, stride_o,
            EBLOCK, PRECISION, DTYPE,
        )  # fmt: skip
