"""The compiled half of the CPU backend (native.c): finding it, and calling it on tensors.

`native.c` is built when the package is installed and a C compiler is there (setup.py). Nothing else
needs it: `available()` is False without it, and the backend then runs on plain PyTorch.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import NESTED_CODE, QuantizedTensor, code_table

__all__ = ["Layer", "available", "dequantize", "fits", "native_status", "select", "serves"]

ABI = 2  # the same number stands in native.c
MAX_SCALES = 1024  # of one row of the weight; the same number stands in native.c
LEVELS = ("portable C", "AVX2", "AVX-512", "NEON")
FORMATS = {"nf4": 0, "fp4": 0, "int4": 0, "int8": 1}
PARTS = ("codes", "absmax", "nested_absmax", "offset")
POOL = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

_selections = 0  # calls of `select`; a layer described before one has to be described anew


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


class _Layer(ctypes.Structure):
    """`Layer` of native.c."""

    _fields_ = (
        ("weight", _Weight),
        ("lora_a", c_void_p),
        ("lora_b", c_void_p),
        ("router", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("experts", c_int64),
        ("rank", c_int64),
        ("top_k", c_int64),
        ("scaling", c_float),
        ("temperature", c_float),
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
    global _selections
    _selections += 1
    wanted = len(LEVELS) - 1 if level is None else LEVELS.index(level)
    return LEVELS[_library().saml_select(wanted)]


def serves(weight: QuantizedTensor) -> bool:
    """Whether `Layer` takes this weight: whole blocks and whole groups of 64 in every row."""
    if not available() or _library().saml_most_rows() == 0 or len(weight.shape) != 2:
        return False
    columns, block = weight.shape[1], weight.block_size
    aligned = columns % 64 == 0 and columns % block == 0 and columns > 0
    power = block >= 32 and block & (block - 1) == 0
    return aligned and power and columns // block <= MAX_SCALES


def fits(m: int, weight: QuantizedTensor) -> bool:
    """Whether `Layer` is the fastest way to multiply this weight by m >= 1 rows."""
    return serves(weight) and 0 < m <= _library().saml_most_rows()


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


class Layer:
    """The operator on one layer's tensors, checked and described to C once, called many times.

    Where the same tensors come again, `holds` says so in a microsecond, which is what one token
    has. It refers to the tensors, so that their memory stays; it is never copied or saved with a
    model.
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        lora_a: Tensor | QuantizedTensor,
        lora_b: Tensor | QuantizedTensor,
        router: Tensor | None,
        bias: Tensor | None,
        scaling: float,
        top_k: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        """Everything float32 and contiguous on the CPU, and `serves(weight)`.

        Args:
            weight: [N, K].
            lora_a: [E, r, K]; lora_b: [E, N, r].
            router: [E, K] of a token router, or None where gates are given to the call.
            bias: [N] or None.
            scaling: s.
            top_k, temperature: of the router, as in `saml_linear_routed`.

        Raises:
            SAMLError: a tensor is not what C will take it for.
        """
        rows, columns = weight.shape
        if not isinstance(lora_a, Tensor) or lora_a.dim() != 3:
            raise SAMLError("lora_a: expected a tensor [E, r, K]")
        experts, rank = lora_a.shape[:2]
        if top_k is not None and not 1 <= top_k <= experts:
            raise SAMLError(f"top_k: {top_k}; expected 1..{experts} or None")
        wanted = {
            "lora_a": (lora_a, (experts, rank, columns)),
            "lora_b": (lora_b, (experts, rows, rank)),
            "router": (router, (experts, columns)),
            "bias": (bias, (rows,)),
        }
        for name, (tensor, shape) in wanted.items():
            if tensor is not None and not (
                isinstance(tensor, Tensor)
                and tensor.shape == shape
                and tensor.dtype == torch.float32
                and tensor.is_cpu
                and tensor.is_contiguous()
            ):
                raise SAMLError(f"{name}: expected contiguous float32 {shape} on the CPU")
        parts: dict[str, Any] = weight._buffers
        self.tensors = (*(parts[n] for n in PARTS), lora_a, lora_b, router, bias)
        self.present = tuple(t for t in self.tensors if t is not None)
        self.addresses = [*map(Tensor.data_ptr, self.present)]
        self.settings = (scaling, top_k, temperature)
        self.selection = _selections
        self.rows, self.columns, self.experts = rows, columns, experts
        self.most_rows = _library().saml_most_rows()
        self.call = _library().saml_linear
        kept = experts if top_k is None else top_k
        addresses = (None if t is None else t.data_ptr() for t in self.tensors[len(PARTS) :])
        self.described = _Layer(
            _describe(weight), *addresses, rows, experts, rank, kept, scaling, temperature
        )
        self.pointer = byref(self.described)

    def __deepcopy__(self, memo: Any) -> None:
        """None: a copied weight is described anew."""

    def __reduce__(self) -> Any:
        """None, for the same reason."""
        return type(None), ()

    def holds(
        self,
        weight: QuantizedTensor,
        lora_a: Tensor | QuantizedTensor,
        lora_b: Tensor | QuantizedTensor,
        router: Tensor | None,
        bias: Tensor | None,
        *settings: Any,
    ) -> bool:
        """Whether it was made for these very tensors, which lie where they lay."""
        parts: dict[str, Any] = weight._buffers
        given = (
            parts["codes"], parts["absmax"], parts["nested_absmax"], parts["offset"],
            lora_a, lora_b, router, bias,
        )  # fmt: skip
        if settings != self.settings or self.selection != _selections:
            return False
        return all(map(is_, self.tensors, given)) and self.lies()

    def lies(self) -> bool:
        """Whether its tensors lie where they lay when they were described."""
        return [*map(Tensor.data_ptr, self.present)] == self.addresses

    def __call__(self, x: Tensor, gates: Tensor | None) -> Tensor:
        """y [..., N] of x [..., K] by gates [..., E] or [E] for all; without gates by the router.

        x and gates float32 and contiguous, which the caller sees to. An expert whose gate is zero
        for all rows that are worked on together is not read.
        """
        y = x.new_empty((*x.shape[:-1], self.rows))
        m = x.numel() // self.columns
        address, stride = None, 0
        if gates is not None:
            address = gates.data_ptr()
            stride = self.experts if gates.numel() == m * self.experts else 0
        refused = self.call(
            self.pointer, x.data_ptr(), address, stride, y.data_ptr(), m, torch.get_num_threads()
        )
        if refused:
            why = "out of memory" if refused == 2 else "weight not served"
            raise RuntimeError(f"native code: {why}: x {tuple(x.shape)}, {self.rows} rows")
        return y


def _describe(weight: QuantizedTensor) -> _Weight:
    """Addresses for C, after checking that what lies there is as long as C will believe."""
    nested, offset = weight.nested_absmax, weight.offset
    parts = (weight.codes, weight.absmax, nested, offset)
    if not all(t is None or (t.is_cpu and t.is_contiguous()) for t in parts):
        raise SAMLError(f"weight: on {weight.device}; expected contiguous buffers on the CPU")
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
    path = Path(__file__).with_name("_native.so")
    if not path.is_file():
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
    if hasattr(library, "saml_linear"):  # x86-64 and aarch64
        library.saml_linear.argtypes = [
            c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int,
        ]  # fmt: skip
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
