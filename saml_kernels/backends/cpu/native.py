"""The compiled half of the CPU backend (native.c): finding it, and calling it on tensors.

`native.c` is built when the package is installed and a C compiler is there (setup.py). Nothing else
needs it: `available()` is False without it, and the backend then runs on plain PyTorch.
"""

from __future__ import annotations

import ctypes
import math
import os
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from saml_kernels.backends.reference import Gating
from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import NESTED_CODE, QuantizedTensor, code_table

__all__ = [
    "Layer",
    "available",
    "dequantize",
    "fits",
    "native_status",
    "select",
    "serves",
    "serves_speakers",
]

ABI = 3  # the same number stands in native.c
MAX_SCALES = 1024  # of one row of the weight; the same number stands in native.c
UNIT, SPANS = 64, (1, 2, 4, 8, 16, 32, 64)  # of a speaker's lora_b; as native_experts.h has them
MOST_SHAPES = 256  # inputs that a layer remembers
FLOAT32 = torch.float32
LEVELS = ("portable C", "AVX2", "AVX-512", "NEON")
FORMATS = {"nf4": 0, "fp4": 0, "int4": 0, "int8": 1, "float32": 2}
PARTS = ("codes", "absmax", "nested_absmax", "offset")
POOL = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

# `Call` of native.c, in one piece: ctypes takes longer over nine arguments than over all the rest.
pack_call = Struct("@PPqPqqPqq").pack

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


class _Speakers(ctypes.Structure):
    """`Speakers` of native.c."""

    _fields_ = (
        ("lora_a", _Weight),
        ("lora_b", _Weight),
        ("count", c_int64),
        ("groups", c_int64),
        ("span", c_int64),
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
        ("speakers", _Speakers),
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

    Attributes:
        many: whether the experts are those of many speakers, or of one in int8.
        one_by_one: whether every row has a speaker.
        most_rows: of x, up to which this is the fastest way.
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        lora_a: Tensor | QuantizedTensor,
        lora_b: Tensor | QuantizedTensor,
        router: Tensor | None,
        bias: Tensor | None,
        scaling: float,
        gating: Gating | None = None,
    ) -> None:
        """Everything float32 and contiguous on the CPU, and `serves(weight)`.

        Args:
            weight: [N, K].
            lora_a: [E, r, K]; lora_b: [E, N, r]. Of S speakers: [S, E, r, K] and [S, E, N, r],
                float32 (lora_b may lie in memory as [S, N, E, r]) or both in int8 without double
                quantisation; of one speaker in int8 as well.
            router: [E, K] of a token router ([S, E, K] of many speakers), or None where gates are
                given to the call.
            bias: [N] or None.
            scaling: s.
            gating: top_k and temperature of the router, as in `saml_linear_routed`.

        Raises:
            SAMLError: a tensor is not what C will take it for.
        """
        rows, columns = weight.shape
        if len(lora_a.shape) not in (3, 4):
            raise SAMLError("lora_a: expected a tensor [E, r, K] or [S, E, r, K]")
        lead, (experts, rank) = lora_a.shape[:-3], lora_a.shape[-3:-1]
        top_k, temperature = gating or (None, 1.0)
        if top_k is not None and not 1 <= top_k <= experts:
            raise SAMLError(f"top_k: {top_k}; expected 1..{experts} or None")
        stored = [t for t in (lora_a, lora_b) if isinstance(t, QuantizedTensor)]
        self.many, self.one_by_one = bool(lead or stored), bool(lead)
        wanted = {
            "lora_a": (lora_a, (*lead, experts, rank, columns)),
            "lora_b": (lora_b, (*lead, experts, rows, rank)),
            "router": (router, (*lead, experts, columns)),
            "bias": (bias, (rows,)),
        }
        for name, (tensor, shape) in wanted.items():
            if isinstance(tensor, QuantizedTensor) and name in ("lora_a", "lora_b"):
                if tensor.shape != shape or len(stored) != 2:
                    raise SAMLError(f"{name}: expected {shape}, both experts in int8 or neither")
            elif tensor is not None and not (
                isinstance(tensor, Tensor)
                and tensor.shape == shape
                and tensor.dtype == torch.float32
                and tensor.is_cpu
                and (tensor.is_contiguous() or (self.many and name == "lora_b"))
            ):
                raise SAMLError(f"{name}: expected contiguous float32 {shape} on the CPU")
        parts: dict[str, Any] = weight._buffers
        self.tensors = (*(parts[n] for n in PARTS), lora_a, lora_b, router, bias)
        self.stored = [(t._buffers, t.codes, t.absmax) for t in stored]
        present = (t if isinstance(t, Tensor) else weight.codes for t in self.tensors)
        self.places = tuple(t.data_ptr for t in present)
        self.addresses = tuple(place() for place in self.places)
        self.stored_places = [t.data_ptr for _, *parts_of in self.stored for t in parts_of]
        self.stored_addresses = [place() for place in self.stored_places]
        self.scaling, self.gating = scaling, gating
        self.selection = _selections
        self.rows, self.columns, self.experts = rows, columns, experts
        self.most_rows = _library().saml_most_rows()
        self.shapes: dict[torch.Size, tuple[int, tuple[int, ...]]] = {}
        self.call = _library().saml_linear  # x86-64 and aarch64; untyped, which takes half as long
        self.speakers = lead[0] if lead else 1
        plain: list[int | None] = [None, None]
        speakers = _Speakers()
        if self.many:
            speakers = _describe_speakers(lora_a, lora_b, self.speakers)
        else:
            plain = [t.data_ptr() for t in (lora_a, lora_b)]  # type: ignore[union-attr,operator]
        addresses = (None if t is None else t.data_ptr() for t in (router, bias))
        chosen = experts if top_k is None else top_k
        self.described = _Layer(
            _describe(weight), *plain, *addresses, rows, experts, rank, chosen, scaling,
            temperature, speakers,
        )  # fmt: skip
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
        scaling: float,
        gating: Gating | None,
    ) -> bool:
        """Whether it was made for these very tensors, which lie where they lay."""
        # Spelled out: a loop over the eight takes as long as all the rest.
        codes, absmax, nested, offset, own_a, own_b, own_router, own_bias = self.tensors
        p0, p1, p2, p3, p4, p5, p6, p7 = self.places
        parts: dict[str, Any] = weight._buffers
        return (
            lora_a is own_a
            and lora_b is own_b
            and router is own_router
            and bias is own_bias
            and parts["codes"] is codes
            and parts["absmax"] is absmax
            and parts["nested_absmax"] is nested
            and parts["offset"] is offset
            and scaling == self.scaling
            and gating == self.gating
            and self.selection == _selections
            and (p0(), p1(), p2(), p3(), p4(), p5(), p6(), p7()) == self.addresses
            and (not self.stored or self._stored_holds())
        )

    def _stored_holds(self) -> bool:
        same = all(p["codes"] is c and p["absmax"] is s for p, c, s in self.stored)
        return same and [place() for place in self.stored_places] == self.stored_addresses

    def _shape(self, shape: torch.Size) -> tuple[int, tuple[int, ...]]:
        """The rows of an x of this shape, 0 where it does not fit, and the shape of its y."""
        fits = shape and shape[-1] == self.columns
        found = (math.prod(shape[:-1]) if fits else 0, (*shape[:-1], self.rows))
        if len(self.shapes) >= MOST_SHAPES:
            self.shapes.clear()
        self.shapes[shape] = found
        return found

    def __call__(
        self,
        x: Tensor,
        gates: Tensor | None,
        index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor | None:
        """y [..., N] of x [..., K] by gates [..., E] or [E] for all; without gates by the router.

        None where x or the gates are not float32, contiguous and on the CPU, or do not fit, and
        where x is too large for this to be the fastest way (unless y is given). An expert whose
        gate is zero for all rows that are worked on together is not read.

        Args:
            x, gates: see above.
            index: int32, contiguous: the speaker of every row of x, or of as many rows side by side
                each; None takes the first for all.
            y: [..., N] that holds x W^T + bias; the experts' part is added to it in place.

        Raises:
            SAMLError: an index is out of range.
        """
        if x.dtype is not FLOAT32 or not x.is_cpu or not x.is_contiguous():
            return None
        shape = x.shape
        m, out = self.shapes.get(shape) or self._shape(shape)
        if not m or (m > self.most_rows and y is None):
            return None
        address = stride = 0
        if gates is not None:
            if gates.dtype is not FLOAT32 or not gates.is_cpu or not gates.is_contiguous():
                return None
            experts, own = self.experts, gates.shape
            if not own or own[-1] != experts or len(own) > len(shape):
                return None
            if gates.numel() != experts:
                if own[:-1] != shape[:-1]:
                    return None
                stride = experts
            address = gates.data_ptr()
        added, whose, each = y is not None, 0, 1
        if y is None:
            y = x.new_empty(*out)  # sizes one by one: a tuple is slower to read
        if index is not None:
            whose, each = index.data_ptr(), m // index.numel()
        threads = torch.get_num_threads()
        packed = pack_call(
            x.data_ptr(), address, stride, y.data_ptr(), m, threads, whose, each, added
        )
        refused = self.call(self.pointer, packed)
        if refused == 3 and index is not None:
            wrong = index[(index < 0) | (index >= self.speakers)]
            raise SAMLError(
                f"speakers: holds {int(wrong[0])}; expected 0..{self.speakers - 1} for these "
                "experts"
            )
        if refused:
            why = "out of memory" if refused == 2 else "weight or experts not served"
            raise RuntimeError(f"native code: {why}: x {tuple(shape)}, {self.rows} rows")
        return y


def serves_speakers(
    lora_a: Tensor | QuantizedTensor, lora_b: Tensor | QuantizedTensor
) -> tuple[int, int] | None:
    """Whether `Layer` takes these experts of many speakers, or of one in int8.

    Args:
        lora_a: [..., E, r, K], float32 or int8 without double quantisation; lora_b: [..., E, N, r].

    Returns:
        What lora_b is in memory, (groups, span) of [..., groups, N, span]; None: not served.
    """
    (experts, rank, columns), rows = lora_a.shape[-3:], lora_b.shape[-2]
    groups, span = experts, rank
    for tensor in (lora_a, lora_b):
        if not isinstance(tensor, QuantizedTensor):
            continue
        if tensor.format != "int8" or tensor.nested_absmax is not None or tensor.block_size < UNIT:
            return None
        if tensor is lora_a and (columns % tensor.block_size or columns // UNIT > MAX_SCALES):
            return None
    if isinstance(lora_b, Tensor) and not lora_b.is_contiguous():
        groups, span = 1, experts * rank
        if not lora_b.transpose(-3, -2).is_contiguous():
            return None
    served = span in SPANS and rows * span % UNIT == 0 and columns % UNIT == 0
    return (groups, span) if served else None


def _describe_speakers(
    lora_a: Tensor | QuantizedTensor, lora_b: Tensor | QuantizedTensor, count: int
) -> _Speakers:
    """Experts [S, E, r, K] and [S, E, N, r] for C.

    Raises:
        SAMLError: C does not serve them.
    """
    laid = serves_speakers(lora_a, lora_b)
    if laid is None:
        shapes = f"{tuple(lora_a.shape)}, {tuple(lora_b.shape)}"
        raise SAMLError(f"lora_a, lora_b: {shapes} are not served by native code as they lie")
    a, b = (_describe(t) if isinstance(t, QuantizedTensor) else _plain(t) for t in (lora_a, lora_b))
    return _Speakers(a, b, count, *laid)


def _plain(tensor: Tensor) -> _Weight:
    """A matrix of float32 for C."""
    return _Weight(codes=tensor.data_ptr(), columns=tensor.shape[-1], format=FORMATS["float32"])


def _describe(weight: QuantizedTensor) -> _Weight:
    """Addresses for C, after checking that what lies there is as long as C will believe."""
    nested, offset = weight.nested_absmax, weight.offset
    parts = (weight.codes, weight.absmax, nested, offset)
    if not all(t is None or (t.is_cpu and t.is_contiguous()) for t in parts):
        raise SAMLError(f"weight: on {weight.device}; expected contiguous buffers on the CPU")
    size = math.prod(weight.shape)
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
        weight.shape[-1],
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
