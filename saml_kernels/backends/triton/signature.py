"""What a kernel is called with, and what tells one compiled kernel from another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "Launch", "Varying", "key_of", "kinds_of", "signature"]

_TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32",
}  # fmt: skip
ALIGNMENT = 16  # bytes of a pointer, multiples of a size: what kernels are specialised on


class Varying(int):
    """A size that changes from call to call: no kernel is specialised on it."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        name: of the kernel, a key of `KERNELS`.
        grid: programs in up to three dimensions.
        arguments: tensors (None where there is none), integers and floats in the kernel's order.
        constants: compile-time values by name.
        warps, stages: of a program.
    """

    name: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


def signature(launch: Launch) -> tuple[list[str], list[int]]:
    """Types of the arguments, and the positions of those that are multiples of 16.

    As Triton does at a first call: an absent tensor is a constant, and so is a size that is 1,
    unless it varies.
    """
    types, aligned = [], []
    for position, value in enumerate(launch.arguments):
        if value is None:
            types.append("constexpr")
        elif isinstance(value, Tensor):
            types.append(_TYPES[value.dtype])
            # Storage begins at a multiple of 16; without memory the offset says the same.
            start = value.storage_offset() * value.itemsize if value.is_meta else value.data_ptr()
            if start % ALIGNMENT == 0:
                aligned.append(position)
        elif isinstance(value, float):
            types.append("fp32")
        elif value == 1 and not isinstance(value, Varying):
            types.append("constexpr")
        else:
            types.append("i32" if abs(value) < 1 << 31 else "i64")
            if not isinstance(value, Varying) and value % ALIGNMENT == 0:
                aligned.append(position)
    return types, aligned


def kinds_of(launch: Launch) -> tuple[Any, ...]:
    """What tells one compiled kernel from another: name, types, alignment, constants, warps."""
    types, aligned = signature(launch)
    absent = tuple(i for i, value in enumerate(launch.arguments) if value is None)
    constants = tuple(sorted(launch.constants.items()))
    return (
        launch.name, tuple(types), absent, tuple(aligned), constants, launch.warps, launch.stages
    )  # fmt: skip


def key_of(launch: Launch) -> str:
    """`kinds_of` as a name for files."""
    return hashlib.sha256(repr(kinds_of(launch)).encode()).hexdigest()[:16]
