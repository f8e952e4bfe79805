"""Low-bit weights: NF4, FP4, INT8 and INT4 in blocks, with optional double quantisation.

Layout (bitsandbytes' own, bit for bit, for NF4 and FP4): the weight is flattened row-major and cut
into blocks of `block_size`; two 4-bit codes share a byte, the first in the high nibble; each block
has one scale, its largest magnitude. Where the in-features are no multiple of the block, blocks run
on into the next row. Double quantisation stores the scales, less their mean, as 8-bit codes in
blocks of 256. INT8 and INT4 are symmetric: scale / 127 and scale / 7 are the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels.errors import SAMLError, needs
from saml_kernels.quantization import layout
from saml_kernels.quantization.bitsandbytes import parse_state
from saml_kernels.quantization.codes import (
    FORMATS,
    NESTED_BLOCK,
    code_table,
    nested_code,
    nested_lookup,
    pair_table,
    sorted_codes,
)
from saml_kernels.quantization.layout import (
    blockwise,
    kernel_scales,
    refresh_scales,
    stored_scales,
)

__all__ = ["NESTED_CODE", "QuantizedTensor", "quantize"]

NESTED_CODE = nested_code()

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class QuantizedTensor(nn.Module):
    """A frozen weight in low bits, as buffers of a module.

    Attributes:
        codes: uint8 [ceil(numel / 2)] for 4-bit formats, int8 [numel] for "int8".
        absmax: float32 [blocks], or uint8 [blocks] under double quantisation.
        nested_absmax: float32 [ceil(blocks / 256)] or None.
        offset: float32 [] or None.
        shape: of the weight; format, block_size: as given to `quantize`.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    native: Any = None  # the CPU backend's description of the layer that this weight is of
    prepared: Any = None  # the Triton backend's calls of that layer

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        shape: Sequence[int],
        format: str,
        block_size: int,
    ) -> None:
        """Take the parts as they are; `validate` checks parts of unknown origin."""
        super().__init__()
        self.shape, self.format, self.block_size = torch.Size(shape), format, block_size
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("offset", offset)

    @classmethod
    def from_parts(
        cls,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        shape: Sequence[int],
        format: str,
        block_size: int,
    ) -> QuantizedTensor:
        """The constructor by name, for callers that hold the parts of a checked tensor."""
        return cls(codes, absmax, nested_absmax, offset, shape, format, block_size)

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
    ) -> QuantizedTensor:
        """Buffers of the right sizes, all zero, for `load_state_dict` to fill."""
        check_settings(format, block_size)
        _check_shape(shape)
        numel = math.prod(shape)
        blocks = -(-numel // block_size)
        if format == "int8":
            codes = torch.zeros(numel, dtype=torch.int8, device=device)
        else:
            codes = torch.zeros((numel + 1) // 2, dtype=torch.uint8, device=device)
        absmax = torch.zeros(
            blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device
        )
        nested = offset = None
        if double_quant:
            nested = torch.zeros(-(-blocks // NESTED_BLOCK), dtype=torch.float32, device=device)
            offset = torch.zeros((), dtype=torch.float32, device=device)
        return cls(codes, absmax, nested, offset, shape, format, block_size)

    def validate(self, name: str = "weight") -> QuantizedTensor:
        """Check sizes, dtypes and scales of parts that came from a file.

        Raises:
            SAMLError: something does not fit; the message names it.
        """
        check_settings(self.format, self.block_size)
        wanted = QuantizedTensor.empty(
            self.shape, self.format, self.block_size, self.double_quant, device="meta"
        )
        for part, expected in wanted.named_buffers():
            found = getattr(self, part)
            if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
                have = None if found is None else (found.dtype, tuple(found.shape))
                raise SAMLError(
                    f"{name}.{part}: {have}; expected {expected.dtype} {tuple(expected.shape)} "
                    f"for a {self.format} weight of shape {tuple(self.shape)}"
                )
            checkable = found.is_floating_point() and not found.is_meta
            if checkable and not torch.isfinite(found).all():
                raise SAMLError(f"{name}.{part}: holds NaN or infinity; the file is damaged")
        return self

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], *rest: Any) -> Any:
        """Refuse functions that are handed the weight itself: its layer is what computes.

        PyTorch's own fused layers ask whether there is this method, and then call their layers.
        """
        name = getattr(func, "__name__", str(func))
        raise SAMLError(
            f"{name}: given a weight in low bits; call its layer, or give weight.dequantize()"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedTensor:
        # `.half()` and `.to(dtype)` concern what the model computes in: only the device follows.
        before = tuple(self._buffers.values())
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = (
                    moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
                )
        if any(a is not b for a, b in zip(before, self._buffers.values(), strict=True)):
            self.prepared = None  # which would keep what has moved
        # A tracer's tensors have no numbers.
        if self.device.type in layout.DEVICES and type(self.absmax) is Tensor:
            self.kernel_scales()
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # PyTorch would cast to the buffer's dtype, and so turn a foreign file into noise.
        parts: dict[str, Any] = {
            name: None if own is None else state_dict.get(prefix + name, own)
            for name, own in self._buffers.items()
        }
        self.from_parts(
            **parts, shape=self.shape, format=self.format, block_size=self.block_size
        ).validate(prefix.removesuffix(".") or "weight")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        refresh_scales(self.absmax, self.nested_absmax, self.offset)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """The device that the codes are on."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: what the weight takes on disk."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    @property
    def device_nbytes(self) -> int:
        """Bytes on a GPU: `nbytes`, and float32 scales where those are stored in 8 bits."""
        return self.nbytes + (4 * self.absmax.numel() if self.double_quant else 0)

    def kernel_scales(self) -> Tensor:
        """float32 [blocks]: the scales as kernels on a GPU read them; see layout.py."""
        return kernel_scales(self.absmax, self.nested_absmax, self.offset)

    def scales(self, blocks: Tensor | None = None) -> Tensor:
        """float32: the scale of each block, double quantisation undone.

        Args:
            blocks: int64, any shape: only those of these blocks; None takes all.
        """
        return stored_scales(self.absmax, self.nested_absmax, self.offset, blocks)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype` (default float32), shape `.shape`.

        float32 code times float32 scale, then one rounding to `dtype`.
        """
        numel = self.shape.numel()
        values = self._values(self.codes)
        scaled = blockwise(values.reshape(-1)[:numel], self.scales(), self.block_size)
        return scaled.reshape(self.shape).to(dtype or torch.float32)

    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Selected rows of a two-dimensional weight, without dequantising the others.

        Args:
            index: int64 [...].
            dtype: of the result; default float32.

        Returns:
            [..., K].

        Raises:
            SAMLError: the weight is not two-dimensional.
        """
        if len(self.shape) != 2:
            raise SAMLError(f"rows: shape {tuple(self.shape)}; expected two dimensions")
        height, width = self.shape
        if width % self.block_size:
            # Row by element: neither bytes nor blocks need to begin where a row does.
            index = torch.arange(height, device=self.device)[index]
            element = index.unsqueeze(-1) * width + torch.arange(width, device=self.device)
            if self.format == "int8":
                values = self._values(self.codes[element])
            else:
                pairs = self._values(self.codes[element // 2])
                values = pairs.gather(-1, (element % 2).unsqueeze(-1)).squeeze(-1)
            return (values * self.scales(element // self.block_size)).to(dtype or torch.float32)
        blocks = width // self.block_size
        selected = self.codes.view(height, -1)[index]
        values = self._values(selected).reshape(*index.shape, blocks, self.block_size)
        block = torch.arange(blocks, device=self.device)
        scales = self.scales((index % height).unsqueeze(-1) * blocks + block)
        scaled = values * scales.unsqueeze(-1)
        return scaled.reshape(*index.shape, width).to(dtype or torch.float32)

    def _values(self, codes: Tensor) -> Tensor:
        """Code values, unscaled: [...] bytes -> float32 [...] ("int8") or [..., 2]."""
        if self.format == "int8":
            return code_table("int8", self.device)[codes.view(torch.uint8).int()]
        return F.embedding(codes.int(), pair_table(self.format, self.device))

    @classmethod
    def from_bitsandbytes(
        cls, packed: Tensor, quant_state: Any, name: str = "weight"
    ) -> QuantizedTensor:
        """Take over a bitsandbytes 4-bit weight, byte for byte.

        Args:
            packed: the packed bytes, any storage dtype and shape.
            quant_state: a `bitsandbytes.functional.QuantState`, or the mapping of a state dict's
                entries: `absmax`, `nested_absmax`, `quant_state.bitsandbytes__nf4`, ...; a prefix
                such as `weight.` is allowed.
            name: for error messages.

        Raises:
            SAMLError: parts are missing or do not fit each other.
        """
        try:
            codes = packed.contiguous().view(torch.uint8).reshape(-1)
            parts = quant_state if isinstance(quant_state, Mapping) else quant_state.as_dict(True)
            tensor = cls(codes, *parse_state(parts))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, SAMLError):
                raise
            raise SAMLError(f"{name}: not a whole bitsandbytes state ({error!r})") from error
        return tensor.validate(name)

    def to_bitsandbytes(self) -> tuple[Tensor, Any]:
        """Packed bytes [n, 1] and a `bitsandbytes.functional.QuantState` with the same contents.

        Raises:
            SAMLError: the format is not NF4 or FP4, or bitsandbytes is not installed.
        """
        if self.format not in ("nf4", "fp4"):
            raise SAMLError(f"to_bitsandbytes: {self.format}; bitsandbytes knows nf4 and fp4")
        with needs("to_bitsandbytes", "bitsandbytes"):
            from bitsandbytes.functional import QuantState
        nested = None
        if self.nested_absmax is not None:
            nested = QuantState(
                absmax=self.nested_absmax,
                code=nested_code(self.device),
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        state = QuantState(
            absmax=self.absmax,
            shape=self.shape,
            code=code_table(self.format, self.device),
            blocksize=self.block_size,
            quant_type=self.format,
            dtype=torch.float32,
            offset=self.offset,
            state2=nested,
        )
        return self.codes.reshape(-1, 1), state

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{tuple(self.shape)}, {self.format}, block_size={self.block_size}"


def quantize(
    weight: Tensor,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantise a weight of any shape.

    Args:
        weight: float16, bfloat16, float32 or float64; one on the meta device gives empty buffers
            of the right sizes there.
        format: one of `FORMATS`.
        block_size: a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        name: for error messages.

    Raises:
        SAMLError: an unknown format or block size, an empty tensor, NaN or infinity, or values so
            large that the mean of their scales overflows under double quantisation.

    Example:
        >>> quantize(torch.ones(8, 64), "nf4").nbytes
        272
    """
    check_settings(format, block_size)
    if not weight.is_floating_point() or weight.numel() == 0:
        raise SAMLError(
            f"{name}: {weight.dtype} {tuple(weight.shape)}; expected a floating-point tensor "
            "with at least one element"
        )
    if weight.is_meta:
        return QuantizedTensor.empty(weight.shape, format, block_size, double_quant, "meta")
    flat = weight.detach().reshape(-1).to(torch.float32)
    if not torch.isfinite(flat).all():
        raise SAMLError(
            f"{name}: {tuple(weight.shape)} holds NaN, infinity or more than float32 can; "
            "expected finite values"
        )
    scaled, absmax = _scale(flat, block_size)
    if format == "int8":
        codes = (scaled * 127).round().to(torch.int8)
    elif format == "int4":
        codes = pack_codes((scaled * 7).round().to(torch.int16) + 8)
    else:
        order, middles = sorted_codes(format, flat.device)
        rank = torch.bucketize(F.pad(scaled, (0, scaled.numel() % 2)), middles, out_int32=True)
        codes = pack_codes(rank if format == "nf4" else order[rank])
    parts: tuple[Tensor, Tensor | None, Tensor | None] = (absmax, None, None)
    if double_quant:
        parts = store_scales(absmax, name)
    return QuantizedTensor(codes, *parts, weight.shape, format, block_size)


def _check_shape(shape: Sequence[int]) -> None:
    if not all(isinstance(n, int) and n > 0 for n in shape) or math.prod(shape) >= 2**48:
        raise SAMLError(f"shape: {tuple(shape)}; expected positive sizes that fit in memory")


def check_settings(format: str, block_size: int) -> None:
    if format not in FORMATS:
        raise SAMLError(f"format: {format!r}; expected one of {', '.join(FORMATS)}")
    if block_size not in BLOCK_SIZES:
        raise SAMLError(f"block_size: {block_size}; expected a power of two from 32 to 4096")


def _scale(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Values divided by their block's largest magnitude, and those magnitudes.

    As bitsandbytes does it, to the bit: whole blocks multiply by the reciprocal, a last partial
    block divides and never has a scale below 1e-38.
    """
    numel = flat.numel()
    whole = numel - numel % block_size
    blocks = flat[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(dim=-1)
    reciprocal = 1.0 / absmax.clamp(min=1e-38)
    scaled = (blocks * reciprocal.unsqueeze(-1)).clamp(-1, 1).reshape(-1)
    if whole < numel:
        rest = flat[whole:]
        last = rest.abs().amax().clamp(min=1e-38)
        absmax = torch.cat((absmax, last.reshape(1)))
        scaled = torch.cat((scaled, (rest / last).clamp(-1, 1)))
    return scaled, absmax


def store_scales(absmax: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation of float32 scales [blocks]: uint8 codes, `nested_absmax`, `offset`.

    Raises:
        SAMLError: their mean overflows; `name` is what they are of.
    """
    # On the CPU: a mean is summed in another order elsewhere, and a model's hash must not be.
    offset = absmax.cpu().mean().to(absmax.device)
    stored, nested = _quantise_scales(absmax - offset)
    if not torch.isfinite(stored_scales(stored, nested, offset)).all():
        raise SAMLError(f"{name}: values too large to average; use double_quant=False")
    return stored, nested, offset


def _quantise_scales(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Scales less their mean -> uint8 codes of the dynamic map, float32 scale per 256."""
    count = centred.numel()
    padded = F.pad(centred, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = padded.abs().amax(dim=-1)
    reciprocal = torch.where(nested > 0, 1.0 / nested, torch.zeros_like(nested))
    # A subnormal `nested` has no finite reciprocal; bitsandbytes gives 0 * infinity code 0.
    scaled = (padded * reciprocal.unsqueeze(-1)).clamp(-1, 1).nan_to_num(nan=-1.0)
    grid = nested_lookup(centred.device)
    position = ((scaled + 1.0) * 0.5 * (len(grid) - 1) + 0.5).int()
    codes = torch.where(nested.unsqueeze(-1) > 0, grid[position], 0).reshape(-1)[:count]
    # A copy: the padding would stay in memory, and safetensors refuses a part of a tensor's memory.
    return codes.to(torch.uint8, copy=True), nested


def pack_codes(codes: Tensor) -> Tensor:
    """Codes 0..15 [n] -> uint8 [ceil(n / 2)], the first of each pair in the high nibble."""
    codes = F.pad(codes.to(torch.uint8), (0, codes.numel() % 2))
    return (codes[::2] << 4) | codes[1::2]
