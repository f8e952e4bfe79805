"""Reading Whisper from CTranslate2's `model.bin` (the format of faster-whisper), without trust.

The file (binary version 6, little endian) is

    uint32 version, string spec, uint32 revision,
    uint32 count, then per variable: string name, uint8 rank, uint32 dims[rank], uint8 dtype,
                                     uint32 bytes, data
    uint32 count, then per alias:    string alias, string variable
    string = uint16 length (final NUL included), characters, NUL

Only the headers are read at first. Names, types, shapes and sizes are compared with what a Whisper
of these dimensions must hold, and every length with the size of the file; memory for the weights is
allocated after that, one tensor at a time.

Source of the layout: CTranslate2 4.x, `python/ctranslate2/specs/model_spec.py` (`_serialize`) and
`whisper_spec.py` (`WhisperSpec`, revision 3).
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saml_kernels.errors import SAMLError

__all__ = ["CTranslate2Whisper", "Dimensions", "Variable"]

# CTranslate2's type ids, in order; bfloat16 is read as its upper 16 bits of a float32.
_DTYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
_NUMPY = {"float32": "<f4", "int8": "i1", "int16": "<i2", "int32": "<i4", "float16": "<f2"}
_NUMPY["bfloat16"] = "<u2"
_QUANTISED = ("int8", "int16")

_MAX_VARIABLES = 20_000  # large has about 1100, twice that when quantised
_MAX_RANK = 3
_NAME = re.compile(rb"[a-z0-9_]+(/[a-z0-9_]+){0,7}")
_LAYER = re.compile(r"(encoder|decoder)/layer_(0|[1-9][0-9]?)/")
_HEAD_SIZE = 64  # every Whisper has it

# Switches that the format stores as scalars: what each must be for the network to be Whisper's.
_GELU = 3
_SWITCHES: dict[str, int | None] = {
    "decoder/activation": _GELU,
    "decoder/alibi": 0,
    "decoder/alibi_use_positive_positions": 0,
    "decoder/alignment_heads": None,
    "decoder/alignment_layer": None,
    "decoder/pre_norm": 1,
    "decoder/scale_alibi": 0,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
_EMBEDDING = "decoder/embeddings/weight"
_HEAD = "decoder/projection/weight"


@dataclass(frozen=True)
class Variable:
    """One stored array: its name, CTranslate2 type, shape and where its bytes lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a Whisper, taken from the shapes of its weights."""

    d_model: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    encoder_ffn: int
    decoder_ffn: int
    mel_bins: int
    vocab_size: int
    source_positions: int
    target_positions: int


@dataclass(frozen=True)
class _Expected:
    """A variable's shape, and the parameters that its rows, cut in equal parts, become."""

    shape: tuple[int, ...]
    targets: tuple[str | None, ...]


class CTranslate2Whisper:
    """A verified `model.bin`, ready to be read tensor by tensor."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Read and check the headers.

        Args:
            paths: `model.bin`, or the parts that make it when joined in this order.

        Raises:
            SAMLError: a file is missing or unreadable, or is anything but a whole Whisper.
        """
        self._stream = _Stream([Path(path) for path in paths])
        variables, aliases = _read_headers(self._stream)
        self._variables = variables
        self._resolved = {name: variables[target] for name, target in aliases.items()} | variables
        self.dimensions = self._measure()
        self._expected = _expected_variables(self.dimensions)
        self._check_names(aliases)
        self._check_shapes()
        self._check_switches()

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (parameter name of `WhisperForConditionalGeneration`, float32 array), each once.

        Quantised weights are dequantised. The key projections' stored bias is left out: it adds
        the same number to a query's score for every key, which softmax ignores.

        Raises:
            SAMLError: a weight is not finite, or the output head is not the token embedding.
        """
        for name, expected in self._expected.items():
            if name == _HEAD:
                continue
            array = self._array(name)
            parts = np.split(array, len(expected.targets))
            for target, part in zip(expected.targets, parts, strict=True):
                if target is not None:
                    yield target, part if len(parts) == 1 else part.copy()
        if self._resolved[_HEAD] != self._resolved[_EMBEDDING] and not np.array_equal(
            self._array(_HEAD), self._array(_EMBEDDING)
        ):
            raise self._stream.error("its output head differs from its token embedding")

    def _array(self, name: str) -> np.ndarray:
        """The variable in float32, in memory of its own; dequantised as CTranslate2 does."""
        variable = self._resolved[name]
        array = self._raw(variable)
        if variable.dtype in _QUANTISED:
            scale = self._raw(self._variables[variable.name + "_scale"])
            if not (scale > 0).all():
                raise self._stream.error(f"{variable.name}_scale is not positive")
            array /= scale.reshape(scale.shape + (1,) * (array.ndim - scale.ndim))
        if not np.isfinite(array).all():
            raise self._stream.error(f"{variable.name} holds infinities or NaNs")
        return array

    def _raw(self, variable: Variable) -> np.ndarray:
        """The stored numbers, unscaled, as float32 in memory of their own."""
        data = self._stream.read(variable.offset, variable.nbytes)
        array = np.frombuffer(data, _NUMPY[variable.dtype]).reshape(variable.shape)
        if variable.dtype == "bfloat16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)

    def _measure(self) -> Dimensions:
        """Dimensions from the few variables that tell them; the rest must then agree."""
        vocab_size, d_model = self._shape(_EMBEDDING, 2)
        if d_model % _HEAD_SIZE:
            raise self._stream.error(f"its width {d_model} is no multiple of {_HEAD_SIZE}")
        layers = {"encoder": 0, "decoder": 0}
        for name in self._resolved:
            if match := _LAYER.match(name):
                layers[match[1]] = max(layers[match[1]], int(match[2]) + 1)
        return Dimensions(
            d_model=d_model,
            heads=d_model // _HEAD_SIZE,
            encoder_layers=layers["encoder"],
            decoder_layers=layers["decoder"],
            encoder_ffn=self._shape("encoder/layer_0/ffn/linear_0/weight", 2)[0],
            decoder_ffn=self._shape("decoder/layer_0/ffn/linear_0/weight", 2)[0],
            mel_bins=self._shape("encoder/conv1/weight", 3)[1],
            vocab_size=vocab_size,
            source_positions=self._shape("encoder/position_encodings/encodings", 2)[0],
            target_positions=self._shape("decoder/position_encodings/encodings", 2)[0],
        )

    def _shape(self, name: str, rank: int) -> tuple[int, ...]:
        variable = self._resolved.get(name)
        if variable is None:
            raise self._stream.error(f"{name} is missing")
        if len(variable.shape) != rank:
            raise self._stream.error(f"{name} has shape {variable.shape}, expected rank {rank}")
        return variable.shape

    def _check_names(self, aliases: dict[str, str]) -> None:
        switches = {"encoder/num_heads", "decoder/num_heads", *_SWITCHES}
        for name in self._expected:
            if name not in self._resolved:
                raise self._stream.error(f"{name} is missing")
        for name in self._resolved:
            owner = name.removesuffix("_scale")
            # A shared weight's scale may be shared with it; it is found by the weight's own name.
            is_scale = owner in self._expected and (owner in aliases) == (name in aliases)
            if name not in self._expected and name not in switches and not is_scale:
                raise self._stream.error(f"it has an unknown variable {name}")
        for alias, target in aliases.items():
            # Sharing vectors is common; sharing matrices would let a small file ask for much.
            if len(self._variables[target].shape) > 1 and alias != _HEAD:
                raise self._stream.error(f"{alias} is an alias of the matrix {target}")

    def _check_shapes(self) -> None:
        for name, expected in self._expected.items():
            variable = self._resolved[name]
            if variable.shape != expected.shape:
                raise self._stream.error(
                    f"{name} has shape {variable.shape}, expected {expected.shape}"
                )
            if variable.dtype == "int32":
                raise self._stream.error(f"{name} has type int32, expected a weight's type")
            scale = self._variables.get(variable.name + "_scale")
            if variable.dtype in _QUANTISED:
                allowed = ((), expected.shape[:1])
                if scale is None or scale.dtype != "float32" or scale.shape not in allowed:
                    raise self._stream.error(f"{name} is {variable.dtype} without a right scale")
            elif scale is not None:
                raise self._stream.error(f"{name} is {variable.dtype} but has a scale")

    def _check_switches(self) -> None:
        heads = self.dimensions.heads
        wanted = {"encoder/num_heads": heads, "decoder/num_heads": heads, **_SWITCHES}
        for name, value in wanted.items():
            variable = self._resolved.get(name)
            if variable is None:
                continue
            if variable.shape != ():
                raise self._stream.error(f"{name} is no scalar")
            stored = float(self._raw(variable))
            if value is not None and stored != value:
                raise self._stream.error(f"{name} is {stored:g}, and Whisper has {value}")


class _Stream:
    """Files read as one, never past the end and without copying what lies in one of them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = str(paths[0])
        self._parts: list[memoryview] = []
        for path in paths:
            if not path.is_file():
                raise SAMLError(f"{path}: no such file; expected the weights of a Whisper model")
            try:
                with open(path, "rb") as handle:
                    self._parts.append(
                        memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
                    )
            except (OSError, ValueError) as error:  # ValueError: the file is empty
                reason = getattr(error, "strerror", None) or str(error)
                raise SAMLError(
                    f"{path}: expected the weights of a CTranslate2 model, cannot read: {reason}"
                ) from error
        self.size = sum(map(len, self._parts))

    def error(self, what: str) -> SAMLError:
        """The error to raise when the content is wrong."""
        return SAMLError(
            f"{self.name}: not a whole CTranslate2 Whisper model: {what}; "
            "download or convert it again"
        )

    def read(self, offset: int, count: int) -> memoryview:
        """Bytes [offset, offset + count)."""
        if count > self.size - offset:
            raise self.error(f"it ends at byte {self.size}, {offset + count - self.size} too early")
        pieces = []
        for part in self._parts:
            start, stop = max(offset, 0), min(offset + count, len(part))
            if start < stop:
                pieces.append(part[start:stop])
            offset -= len(part)
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))


class _Cursor:
    """A position in a stream that numbers and strings are taken from."""

    def __init__(self, stream: _Stream) -> None:
        self.stream = stream
        self.offset = 0

    def skip(self, count: int) -> int:
        """Step over `count` bytes that must exist; return where they begin."""
        start = self.offset
        if count > self.stream.size - start:
            raise self.stream.error(f"its data at byte {start} would end after the file does")
        self.offset += count
        return start

    def number(self, code: str) -> int:
        """One little-endian unsigned integer, by its `struct` code."""
        size = struct.calcsize("<" + code)
        value: int = struct.unpack("<" + code, self.stream.read(self.skip(size), size))[0]
        return value

    def string(self) -> str:
        """A zero-terminated name, its length before it."""
        size = self.number("H")
        text = bytes(self.stream.read(self.skip(size), size))
        if not text.endswith(b"\0") or len(text) > 256:
            raise self.stream.error(f"no proper string at byte {self.offset - size}")
        return text[:-1].decode("ascii", "replace")

    def name(self) -> str:
        """One variable's name."""
        name = self.string()
        if not _NAME.fullmatch(name.encode("utf-8")):
            raise self.stream.error(f"no variable's name before byte {self.offset}")
        return name


def _read_headers(stream: _Stream) -> tuple[dict[str, Variable], dict[str, str]]:
    """The variables by name, and the aliases (alias -> variable), all within the file."""
    cursor = _Cursor(stream)
    version = cursor.number("I")
    if version != 6:
        raise stream.error(f"its binary version is {version}, expected 6")
    spec, revision = cursor.string(), cursor.number("I")
    if (spec, revision) != ("WhisperSpec", 3):
        raise stream.error(f"it is {spec!a} revision {revision}, expected WhisperSpec revision 3")

    variables: dict[str, Variable] = {}
    for _ in range(_read_count(cursor)):
        variable = _read_variable(cursor)
        if variable.name in variables:
            raise stream.error(f"{variable.name} occurs twice")
        variables[variable.name] = variable

    aliases: dict[str, str] = {}
    for _ in range(_read_count(cursor)):
        alias, target = cursor.name(), cursor.name()
        if alias in aliases or alias in variables:
            raise stream.error(f"{alias} occurs twice")
        if target not in variables:
            raise stream.error(f"{alias} is an alias of the unknown variable {target}")
        aliases[alias] = target

    if cursor.offset != stream.size:
        raise stream.error(f"{stream.size - cursor.offset} bytes follow its end")
    return variables, aliases


def _read_count(cursor: _Cursor) -> int:
    count = cursor.number("I")
    if count > _MAX_VARIABLES:
        raise cursor.stream.error(f"it claims {count} variables, more than {_MAX_VARIABLES}")
    return count


def _read_variable(cursor: _Cursor) -> Variable:
    """One variable's header; its data is stepped over."""
    stream, name = cursor.stream, cursor.name()
    rank = cursor.number("B")
    if rank > _MAX_RANK:
        raise stream.error(f"{name} has rank {rank}, more than {_MAX_RANK}")
    shape = tuple(cursor.number("I") for _ in range(rank))
    type_id = cursor.number("B")
    if type_id >= len(_DTYPES):
        raise stream.error(f"{name} has the unknown type {type_id}")
    dtype, nbytes = _DTYPES[type_id], cursor.number("I")
    wanted = math.prod(shape) * np.dtype(_NUMPY[dtype]).itemsize
    if nbytes != wanted or not wanted:
        raise stream.error(f"{name} has {nbytes} bytes, its shape {shape} of {dtype} {wanted}")
    return Variable(name, dtype, shape, cursor.skip(nbytes), nbytes)


def _expected_variables(sizes: Dimensions) -> dict[str, _Expected]:
    """Every weight that a Whisper of these sizes has, and the parameters it becomes."""
    table: dict[str, _Expected] = {}
    d = sizes.d_model

    def linear(name: str, rows: int, columns: int, *targets: str) -> None:
        biases = tuple(None if t.endswith("k_proj") else f"{t}.bias" for t in targets)
        weights = tuple(f"{t}.weight" for t in targets)
        table[f"{name}/weight"] = _Expected((rows, columns), weights)
        table[f"{name}/bias"] = _Expected((rows,), biases)

    def norm(name: str, target: str) -> None:
        table[f"{name}/gamma"] = _Expected((d,), (f"{target}.weight",))
        table[f"{name}/beta"] = _Expected((d,), (f"{target}.bias",))

    def attention(name: str, target: str, own: bool) -> None:
        q, k, v = (f"{target}.{part}_proj" for part in "qkv")
        if own:
            linear(f"{name}/linear_0", 3 * d, d, q, k, v)
            linear(f"{name}/linear_1", d, d, f"{target}.out_proj")
        else:
            linear(f"{name}/linear_0", d, d, q)
            linear(f"{name}/linear_1", 2 * d, d, k, v)
            linear(f"{name}/linear_2", d, d, f"{target}.out_proj")
        norm(f"{name}/layer_norm", f"{target}_layer_norm")

    def side(name: str, layers: int, ffn: int, positions: int) -> None:
        target = f"model.{name}"
        table[f"{name}/position_encodings/encodings"] = _Expected(
            (positions, d), (f"{target}.embed_positions.weight",)
        )
        norm(f"{name}/layer_norm", f"{target}.layer_norm")
        for i in range(layers):
            here, there = f"{name}/layer_{i}", f"{target}.layers.{i}"
            attention(f"{here}/self_attention", f"{there}.self_attn", own=True)
            if name == "decoder":
                attention(f"{here}/attention", f"{there}.encoder_attn", own=False)
            linear(f"{here}/ffn/linear_0", ffn, d, f"{there}.fc1")
            linear(f"{here}/ffn/linear_1", d, ffn, f"{there}.fc2")
            norm(f"{here}/ffn/layer_norm", f"{there}.final_layer_norm")

    for i, channels in ((1, sizes.mel_bins), (2, d)):
        target = f"model.encoder.conv{i}"
        table[f"encoder/conv{i}/weight"] = _Expected((d, channels, 3), (f"{target}.weight",))
        table[f"encoder/conv{i}/bias"] = _Expected((d,), (f"{target}.bias",))
    side("encoder", sizes.encoder_layers, sizes.encoder_ffn, sizes.source_positions)
    side("decoder", sizes.decoder_layers, sizes.decoder_ffn, sizes.target_positions)
    table[_EMBEDDING] = _Expected((sizes.vocab_size, d), ("model.decoder.embed_tokens.weight",))
    table[_HEAD] = _Expected((sizes.vocab_size, d), ("proj_out.weight",))
    return table
