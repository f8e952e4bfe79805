"""Sixteen code values by byte permutes: the PTX that decodes packed four-bit weights.

A `prmt` picks four bytes out of eight by four selectors of four bits, which is how packed codes
already lie: one instruction looks up four codes in half a table of bytes, a second does the other
half, and a third takes, for each code, the half that its top bit names. One such triple per byte of
the result: two for 16-bit values, four for float32.

No Triton in this file: its text is tested against every byte without a GPU.
"""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from saml_kernels.quantization.codes import code_table

__all__ = ["lookup_ptx"]

_HIGH, _LOW = 0x7351, 0x6240  # of two planes: the codes in high nibbles, those in low nibbles
_FIRST, _SECOND = 0x5410, 0x7632  # of two pairs of planes: one value of four bytes


@cache
def lookup_ptx(format: str, dtype: str) -> str:
    """PTX from four packed bytes to the values of their high nibbles, then of their low ones.

    Args:
        format: "nf4", "fp4" or "int4".
        dtype: of the values: "float16", "bfloat16" or "float32".

    Returns:
        Text for `tl.inline_asm_elementwise(pack=4)`: results in $0.. (two registers for each byte
        of a value: the high nibbles of bytes 0..3, then the low ones), then the packed bytes.
    """
    planes = _planes(code_table(format, torch.device("cpu")).to(getattr(torch, dtype)))
    width = len(planes)
    source = f"${2 * width}"
    lines = [".reg .b32 half, low, pick, a, b, q, r;", f".reg .b32 p<{width}>;"]
    for half in range(2):
        lines += [
            f"shr.b32 half, {source}, {16 * half};",
            "and.b32 low, half, 0x7777;",
            "and.b32 pick, half, 0x8888;",
            "shr.b32 pick, pick, 1;",
            "or.b32 pick, pick, 0x3210;",
        ]
        for plane, words in enumerate(planes):
            lines += [
                f"mov.b32 a, {words[0]:#010x};",
                f"mov.b32 b, {words[1]:#010x};",
                "prmt.b32 q, a, b, low;",
                f"mov.b32 a, {words[2]:#010x};",
                f"mov.b32 b, {words[3]:#010x};",
                "prmt.b32 r, a, b, low;",
                f"prmt.b32 p{plane}, q, r, pick;",
            ]
        for nibble, order in enumerate((_HIGH, _LOW)):
            if width == 2:
                lines.append(f"prmt.b32 ${2 * nibble + half}, p0, p1, {order:#06x};")
                continue
            first = 4 * nibble + 2 * half
            lines += [
                f"prmt.b32 q, p0, p1, {order:#06x};",
                f"prmt.b32 r, p2, p3, {order:#06x};",
                f"prmt.b32 ${first}, q, r, {_FIRST:#06x};",
                f"prmt.b32 ${first + 1}, q, r, {_SECOND:#06x};",
            ]
    return "{\n" + "\n".join(lines) + "\n}"


def _planes(table: Tensor) -> list[list[int]]:
    """Byte `p` of all sixteen values, as four words of four bytes each."""
    values = table.view(torch.uint8).view(16, -1).T
    return [list(struct.unpack("<4I", bytes(plane.tolist()))) for plane in values]
