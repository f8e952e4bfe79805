"""The CPU backend.

Forward takes one of two ways, whichever was measured to be faster (`python -m bench --work P6`):

* native: one pass over the packed weight in compiled code, the experts and a token's router
  included (native.py, native.c);
* dense: the weight dequantised to scratch (by compiled code where there is some), then torch's
  matrix products.

Backward is always dense. Everything is computed in float32, and bfloat16 inputs in bfloat16 where
the processor multiplies it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_kernels.backends.cpu import native
from saml_kernels.backends.cpu.native import native_status
from saml_kernels.backends.reference import (
    Gating,
    Gradients,
    experts_backward,
    gates_from_logits,
    stack_a,
    stack_b,
)
from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = [
    "backward",
    "forward",
    "forward_prepared",
    "keep_dense",
    "native_status",
    "unsupported",
    "why_unavailable",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32 = torch.float32
INDICES = (torch.int32, torch.int64)
ROUTING = True  # makes the gates of a token router
STRETCH = 64  # rows of one speaker from which they are best worked on by themselves
BFLOAT16_ROWS = 16  # from here on bfloat16 matrix units beat the float32 native path


def forward(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    speakers: None = None,
    gating: Gating | None = None,
) -> Tensor:
    """y = x W^T + scaling * sum_e gates_e (x A_e^T) B_e^T + bias.

    Args:
        x: [M, K], float32, bfloat16 or float16, any strides; M may be 0.
        weight: quantised [N, K].
        lora_a: [E, r, K]; E may be 0.
        lora_b: [E, N, r].
        gates: [M, E].
        bias: [N] or None.
        scaling: s, usually alpha / r.
        speakers: None; grouping.py knows many.
        gating: of a token router, whose weight V [E, K] then stands in place of the gates.

    Returns:
        [M, N] in the dtype of `x`, contiguous.
    """
    dtype = _compute_dtype(x)
    if dtype == torch.float32 and native.fits(x.shape[0], weight):
        wide_bias = None if bias is None else _plain(bias)
        given, router = (_plain(gates), None) if gating is None else (None, _plain(gates))
        layer = native.Layer(
            weight, _plain(lora_a), _plain(lora_b), router, wide_bias, scaling, gating
        )
        y = layer(_plain(x), given)
        assert y is not None
        return y.to(x.dtype)

    wide = x.to(dtype)
    with torch.autocast("cpu", enabled=False):  # `dtype` is chosen already
        y = F.linear(wide, _dense(weight, dtype), None if bias is None else bias.to(dtype))
        experts, rank, _ = lora_a.shape
        if experts:
            gates = gates.to(dtype)
            if gating is None:
                projected = F.linear(wide, stack_a(lora_a).to(dtype))
            else:  # the logits are more projections
                both = F.linear(wide, torch.cat((stack_a(lora_a).to(dtype), gates)))
                projected, logits = both.split((experts * rank, experts), dim=-1)
                gates = gates_from_logits(logits, *gating).to(dtype)
            hidden = projected * gates.repeat_interleave(rank, dim=-1)
            y.addmm_(hidden, stack_b(lora_b).to(dtype).T, alpha=scaling)
    return y.to(x.dtype)


def forward_prepared(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor | QuantizedTensor,
    lora_b: Tensor | QuantizedTensor,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    gating: Gating | None = None,
    speakers: Tensor | None = None,
) -> Tensor | None:
    """The whole operator in one call to C, or None where a call is out of the ordinary.

    Ordinary is float32, contiguous, on the CPU, nothing but the result wanted. A layer's own
    tensors are checked when they are first seen; a token is a matter of microseconds.

    Args:
        x: [..., K]; gates [..., E], all its leading sizes those of `x` or all 1.
        weight, lora_a, lora_b, bias, scaling: as in `forward`.
        gating: of a token router, whose weight [E, K] then stands in place of the gates.
        speakers: int32 or int64 [...], broadcast over the rows of `x`; lora_a, lora_b and the
            router are then those of many.

    Raises:
        SAMLError: a speaker index is out of range.
    """
    router = None if gating is None else gates
    layer = weight.native
    if layer is None or not layer.holds(weight, lora_a, lora_b, router, bias, scaling, gating):
        if not native.serves(weight) or not (gating is None or 0.0 < gating[1] < float("inf")):
            return None
        try:
            layer = native.Layer(weight, lora_a, lora_b, router, bias, scaling, gating)
        except SAMLError:  # said better by the checks of the whole way, or converted there
            return None
        weight.native = layer
    if layer.many:
        return _of_many(layer, x, weight, gates if router is None else None, bias, speakers)
    if speakers is not None:
        return None
    return layer(x, gates if router is None else None)


def _of_many(
    layer: native.Layer,
    x: Tensor,
    weight: QuantizedTensor,
    gates: Tensor | None,
    bias: Tensor | None,
    speakers: Tensor | None,
) -> Tensor | None:
    """`forward_prepared` of many speakers' experts, or of one speaker's in int8."""
    if x.dtype is not FLOAT32 or (speakers is None) is layer.one_by_one or not x.numel():
        return None
    index, shape = speakers, x.shape
    try:
        if index is not None:
            if not index.is_cpu or index.dtype not in INDICES:
                return None
            clips = index.dim() == len(shape) - 1 and index.numel() == index.shape[0] == shape[0]
            if not clips:  # not as layers give it, one for each clip
                index = index.expand(shape[:-1])
            if index.dtype is not torch.int32 or not index.is_contiguous():
                index = index.to(torch.int32).contiguous()
        if gates is not None:
            gates = gates.expand(*shape[:-1], layer.experts).contiguous()
    except RuntimeError:  # does not broadcast: said better by the checks
        return None
    y = None
    if x.numel() > layer.most_rows * layer.columns:
        y = F.linear(x, _dense(weight, FLOAT32), bias)
    return layer(x, gates, index, y)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    scaling: float,
    needs: tuple[bool, bool, bool, bool],
    speakers: None = None,
    gating: Gating | None = None,
) -> Gradients:
    """Gradients of (x, lora_a, lora_b, gates), each None where `needs` says so.

    Args:
        dy: [M, N]; the others as in `forward`.

    Returns:
        Four tensors in the shapes and dtypes of their inputs, or None; with `gating` the last is
        the router's. The chain rule is the one in `reference.py`.
    """
    dtype = _compute_dtype(x)
    inputs = (x, lora_a, lora_b, gates)
    dy, *wide = (t.to(dtype) for t in (dy, *inputs))
    with torch.autocast("cpu", enabled=False):
        dx = dy @ _dense(weight, dtype) if needs[0] else None
        if gating is None:
            gradients = experts_backward(dy, wide[0], wide[1], wide[2], wide[3], scaling, needs, dx)
        else:
            gradients = _routed_backward(
                dy, wide[0], wide[1], wide[2], wide[3], scaling, needs, dx, gating
            )
    dx, da, db, dg = (
        None if g is None else g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)
    )
    return dx, da, db, dg


def _routed_backward(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor,
    scaling: float,
    needs: tuple[bool, bool, bool, bool],
    base: Tensor | None,
    gating: Gating,
) -> Gradients:
    """`reference.experts_backward` through a token router V [E, K], E > 0.

    The logits Z = x V^T are E more projections: dX gains [dP | dZ] [A ; V], and dA and dV are one
    product with x.
    """
    need_x, need_a, need_b, need_router = needs
    experts, rank, _ = lora_a.shape
    directions = experts * rank
    stacked, b = torch.cat((stack_a(lora_a), router)), stack_b(lora_b)
    both = x @ stacked.T
    projected = both[:, :directions]
    gates = gates_from_logits(both[:, directions:], *gating)
    repeated = gates.to(x.dtype).repeat_interleave(rank, dim=-1)
    dx, da, db, dv = base, None, None, None
    if need_x or need_a or need_router:
        dh = (dy @ b).mul_(scaling)
        # R numbers are summed, and gradients of gates subtracted: in float32 at least.
        dg = (projected.float() * dh).view(len(x), experts, rank).sum(-1)
        dz = gates * (dg - (gates * dg).sum(-1, keepdim=True)) / gating[1]
        gradients = torch.cat((dh.mul_(repeated), dz.to(x.dtype)), dim=1)
        if base is not None:
            dx = base.addmm_(gradients, stacked)
        if need_a or need_router:
            of_both = gradients.T @ x
            da, dv = of_both[:directions].view_as(lora_a), of_both[directions:]
    if need_b:
        of_b = ((projected * repeated).T @ dy).mul_(scaling)  # [R, N], the faster way round
        db = of_b.view(experts, rank, len(b)).transpose(1, 2).contiguous()
    return dx, da if need_a else None, db, dv if need_router else None


def why_unavailable() -> str | None:
    """None: it runs everywhere."""
    return None


def unsupported(x: Tensor, weight: QuantizedTensor) -> str | None:
    """Why these arguments cannot run here, or None if they can."""
    if x.device.type != "cpu" or weight.codes.device.type != "cpu":
        return f"x is on {x.device}, the weight on {weight.codes.device}; it runs on the CPU only"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; it takes float32, bfloat16 and float16"
    return None


def _plain(tensor: Tensor) -> Tensor:
    """The same values as contiguous float32; asks first, as one token is a matter of 10 us."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


class _Kept:
    """Dequantised weights by the address of their codes, which are held so that it stays theirs."""

    def __init__(self, most: int) -> None:
        self.left, self.found = most, dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]()


_kept: _Kept | None = None


@contextmanager
def keep_dense(most: int) -> Iterator[None]:
    """Within the block weights stay dequantised, up to `most` bytes of them; else none does.

    For training, which meets each frozen weight twice a step. They must not change meanwhile.
    """
    global _kept
    before, _kept = _kept, _Kept(most)
    try:
        yield
    finally:
        _kept = before


def _dense(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The whole weight [N, K]; one block of scratch beat cache-sized panels in most shapes."""
    kept = _kept
    if kept is None:
        return _dequantised(weight, dtype)
    key = weight.codes.data_ptr(), dtype
    found = kept.found.get(key)
    if found is not None:
        return found[1].view(weight.shape)
    dense = _dequantised(weight, dtype)
    if dense.nbytes <= kept.left:
        kept.left -= dense.nbytes
        kept.found[key] = weight.codes, dense
    return dense


def _dequantised(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    if not native.available():
        return weight.dequantize(dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    return native.dequantize(weight, 0, weight.shape[0], out)


def _compute_dtype(x: Tensor) -> torch.dtype:
    many = x.shape[0] >= BFLOAT16_ROWS
    return torch.bfloat16 if x.dtype == torch.bfloat16 and many and _bfloat16() else torch.float32


@cache
def _bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; emulated, it loses to float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())
