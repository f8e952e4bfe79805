"""The PTX that decodes four-bit codes, emulated instruction by instruction for every byte."""

import re
import struct

import numpy as np
import pytest
import torch

from saml_kernels.backends.triton.kernels.lookup import lookup_ptx
from saml_kernels.quantization.codes import code_table


def prmt(a: int, b: int, selectors: int) -> int:
    """PTX ISA, `prmt.b32`, default mode: four bytes out of eight, sign-replicating on bit 3."""
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    found = []
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = pool[selector & 7]
        found.append((255 if byte & 128 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(found), "little")


OPERATIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "shr": lambda a, b: a >> b,
    "prmt": prmt,
}


def emulate(text: str, source: str, word: int) -> dict[str, int]:
    registers = {source: word}
    for line in text.splitlines():
        match = re.fullmatch(r"(mov|and|or|shr|prmt)\.b32 ([^,]+), (.*);", line)
        if match is None:
            assert line in "{}" or line.startswith(".reg"), line
            continue
        name, target, operands = match.groups()
        values = [registers[o] if o in registers else int(o, 0) for o in operands.split(", ")]
        registers[target] = OPERATIONS[name](*values) & 0xFFFFFFFF
    return registers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_every_byte(format, dtype):
    text = lookup_ptx(format, dtype)
    values = code_table(format, torch.device("cpu")).to(getattr(torch, dtype))
    width, kind = values.itemsize, {2: np.uint16, 4: np.uint32}[values.itemsize]
    table = values.view({2: torch.uint16, 4: torch.uint32}[width]).numpy()
    for byte in range(256):
        # The byte in each of the four places, with others beside it.
        packed = [byte, (byte * 7 + 3) % 256, 255 - byte, byte]
        registers = emulate(text, f"${2 * width}", int.from_bytes(bytes(packed), "little"))
        words = [registers[f"${i}"] for i in range(2 * width)]
        values = np.frombuffer(struct.pack(f"<{2 * width}I", *words), kind)
        high, low = values[:4], values[4:]
        np.testing.assert_array_equal(high, table[[p >> 4 for p in packed]])
        np.testing.assert_array_equal(low, table[[p & 15 for p in packed]])
