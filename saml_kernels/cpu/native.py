"""The compiled half of the CPU backend (native.c): finding it, and calling it on tensors.

`native.c` is built when the package is installed and a C compiler is there (setup.py). Nothing else
needs it: `available()` is False without it, and the backend then runs on plain PyTorch.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.quant import NESTED_CODE, QuantizedTensor, code_table

__all__ = ["available", "dequantize", "fits", "linear", "native_status", "select"]

CACHE = 384 * 1024  # bytes of x worked on at a time: half of a common second-level cache
ABI = 1  # the same number stands in native.c
MAX_SCALES = 1024  # of one row of the weight; the same number stands in native.c
LEVELS = ("portable C", "AVX2", "AVX-512")
FORMATS = {"nf4": 0, "fp4": 0, "int4": 0, "int8": 1}
POOL = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")


class _Weight(ctypes.Structure):
    """`Weight` of native.c."""

    _fields_ = (
        ("codes", c_void_p),
        ("absmax", c_void_p),
        ("nested", c_void_p),
        ("offset", c_void_p),
        ("nested_code", c_void_p),
        ("table", c_void_p),
        ("block", c_int64),
        ("columns", c_int64),
        ("format", c_int),
    )


def available() -> bool:
    """Whether the compiled half is loaded."""
    return _loaded()[0] is not None


def native_status() -> str:
    """One line for people: instruction set and threads in use, or why there is no native code."""
    library, note = _loaded()
    if library is None:
        return note
    return f"native code: {LEVELS[library.saml_level()]}, {note}"


def select(level: str | None = None) -> str:
    """Use instruction set `level` of `LEVELS`, or the best below it here; None is the best.

    Returns:
        The one now in use. For tests and benchmarks; it holds for the whole process.
    """
    wanted = len(LEVELS) - 1 if level is None else LEVELS.index(level)
    return LEVELS[_library().saml_select(wanted)]


def fits(m: int, weight: QuantizedTensor) -> bool:
    """Whether `linear` serves this weight, and is the fastest way to multiply it by m >= 1 rows.

    It needs whole blocks and whole groups of 64 in every row of the weight.
    """
    if not available() or not 0 < m <= _library().saml_most_rows():
        return False
    columns, block = weight.shape[1], weight.block_size
    aligned = columns % 64 == 0 and columns % block == 0 and columns > 0
    power = block >= 32 and block & (block - 1) == 0
    return aligned and power and columns // block <= MAX_SCALES


def dequantize(weight: QuantizedTensor, first: int, last: int, out: Tensor) -> Tensor:
    """Rows [first, last) of a weight [N, K] into `out`, contiguous float32 or bfloat16.

    Equal to `weight.dequantize(out.dtype)[first:last]` bit for bit.
    """
    _library().saml_dequantise(
        byref(_describe(weight)),
        first,
        last,
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def linear(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    """The whole operator in one pass over the packed weight, which is never written out.

    All tensors float32 and contiguous, and `fits(M, weight)`; shapes as in `reference.py`.
    An expert whose gate is zero for all rows that are worked on together is not read.
    """
    m, columns = x.shape
    rows = weight.shape[0]
    experts, rank, _ = lora_a.shape
    threads = torch.get_num_threads()
    slab = min(m, max(12, CACHE // (4 * columns) // 12 * 12))
    y = torch.empty(m, rows)
    scratch = torch.empty(threads * slab * (columns + experts * rank))
    address = scratch.data_ptr()
    refused = _library().saml_linear(
        byref(_describe(weight)),
        x.data_ptr(),
        lora_a.data_ptr(),
        lora_b.data_ptr(),
        gates.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        address,
        address + 4 * threads * slab * columns,
        m,
        slab,
        rows,
        experts,
        rank,
        scaling,
        threads,
    )
    if refused:
        raise RuntimeError(f"native code refused x {tuple(x.shape)}, weight {tuple(weight.shape)}")
    return y


def _describe(weight: QuantizedTensor) -> _Weight:
    """Addresses for C, after checking that what lies there is as long as C will believe."""
    nested, offset = weight.nested_absmax, weight.offset
    size = weight.shape[0] * weight.shape[1]
    blocks = -(-size // weight.block_size)
    packed = size if weight.format == "int8" else (size + 1) // 2
    if (
        weight.codes.numel() < packed
        or weight.absmax.numel() < blocks
        or (nested is not None and (offset is None or nested.numel() * 256 < blocks))
    ):
        shape = tuple(weight.shape)
        raise SAMLError(f"weight: buffers too short for shape {shape}; quantize it again")
    return _Weight(
        weight.codes.data_ptr(),
        weight.absmax.data_ptr(),
        None if nested is None else nested.data_ptr(),
        None if offset is None else offset.data_ptr(),
        None if nested is None else _nested_table().data_ptr(),
        None if weight.format == "int8" else _table(weight.format).data_ptr(),
        weight.block_size,
        weight.shape[1],
        FORMATS[weight.format],
    )


@cache
def _table(format: str) -> Tensor:
    return code_table(format).to("cpu", torch.float32).contiguous()


@cache
def _nested_table() -> Tensor:
    return NESTED_CODE.to("cpu", torch.float32).contiguous()


def _library() -> ctypes.CDLL:
    library, note = _loaded()
    if library is None:
        raise RuntimeError(note)
    return library


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, and a note on its threads or on why it is missing."""
    here = Path(__file__).parent
    built = (here / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    path = next((p for p in built if p.is_file()), None)
    if path is None:
        return None, "no native code: built without a C compiler; install one, then reinstall"
    try:
        library = ctypes.CDLL(str(path))
        if library.saml_abi() != ABI:
            return None, f"no native code: {path.name} is of another version; reinstall"
    except (OSError, AttributeError) as error:
        return None, f"no native code: {path.name} does not load: {error}"
    library.saml_select.argtypes = [c_int]
    library.saml_select(len(LEVELS) - 1)
    library.saml_set_threads.argtypes = [c_void_p] * 4
    library.saml_set_threads.restype = None
    library.saml_dequantise.argtypes = [POINTER(_Weight), c_int64, c_int64, c_void_p, c_int, c_int]
    library.saml_dequantise.restype = None
    library.saml_most_rows.restype = c_int64
    if hasattr(library, "saml_linear"):  # x86-64 only
        library.saml_linear.argtypes = [
            POINTER(_Weight),
            *([c_void_p] * 8),
            *([c_int64] * 5),
            c_float,
            c_int,
        ]
    pool = _torch_threads()
    if pool is None:
        return library, "one thread (torch's OpenMP runtime has no GOMP entry points)"
    library.saml_set_threads(*pool)
    return library, "torch's threads"


def _torch_threads() -> list[int | None] | None:
    """Addresses of `POOL` in the OpenMP runtime that torch itself is linked to."""
    core = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        runtime = ctypes.CDLL(str(core), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return [ctypes.cast(getattr(runtime, name), c_void_p).value for name in POOL]
    except (OSError, AttributeError):
        return None
