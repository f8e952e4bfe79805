"""The custom operators `saml_kernels::linear` and `saml_kernels::linear_backward`.

One operator of PyTorch's carries every backend. It has a fake implementation (so that
`torch.compile(fullgraph=True)` traces through), an autograd formula, and refuses `vmap` by name.
`linear_kept` is the same where gradients are wanted of a backend that keeps P and a router's gates
for them: they are results too, so that a compiled graph hands them from forward to backward.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, library

from saml_kernels.backends import grouping
from saml_kernels.backends.reference import Gating, Gradients
from saml_kernels.backends.registry import BACKENDS
from saml_kernels.errors import SAMLError
from saml_kernels.ops.autograd import NO_SECOND_ORDER, learning
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["backward", "forward", "linear", "parts_of"]

_WEIGHT = (
    "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, "
    "int[] shape, str format, int block_size"
)
# `gates` is [M, E]; where a temperature is given, the router [E, K] that makes them.
_EXPERTS = "Tensor lora_a, Tensor lora_b, Tensor gates"
ARGUMENTS = 17  # of `linear`
_library = library.Library("saml_kernels", "DEF")
_LINEAR = (
    f"Tensor x, {_WEIGHT}, {_EXPERTS}, Tensor? bias, float scaling, str backend, "
    "Tensor? speakers, int? top_k=None, float? temperature=None"
)
# The first call makes what later ones share (tables of codes, counters): PyTorch's own CUDA graphs
# would have it in their memory.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_library.define(f"linear({_LINEAR}) -> Tensor", tags=_TAGS)
_library.define(f"linear_kept({_LINEAR}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_library.define(
    f"linear_backward(Tensor dy, Tensor x, {_WEIGHT}, {_EXPERTS}, float scaling, str backend, "
    "bool[] needs, Tensor? speakers, int? top_k=None, float? temperature=None, "
    "Tensor? plain=None, Tensor? made=None) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def linear(
    name: str,
    rows: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    speakers: Tensor | None,
    gating: Gating | None,
) -> Tensor:
    """y [M, N] by the operator `saml_kernels::linear`, or `linear_kept`."""
    given = (
        rows, *parts_of(weight), lora_a, lora_b, gates, bias, scaling, name, speakers,
        *(gating or (None, None)),
    )  # fmt: skip
    if getattr(BACKENDS[name], "KEEPS", False) and learning(rows, lora_a, lora_b, gates):
        return torch.ops.saml_kernels.linear_kept(*given)[0]
    return torch.ops.saml_kernels.linear(*given)


def forward(name: str, *arguments: Any) -> Tensor:
    """The backend's forward; the last arguments are the speaker index and the gating, or None."""
    return _of_backend("forward", name, *arguments)


def backward(name: str, *arguments: Any) -> Gradients:
    """The backend's backward; the last arguments are the speaker index and the gating, or None."""
    return _of_backend("backward", name, *arguments)


def _of_backend(direction: str, name: str, *arguments: Any) -> Any:
    backend = BACKENDS[name]
    own = getattr(backend, direction)
    *call, speakers, gating = arguments
    if gating is not None:
        return own(*call, speakers, gating)
    if speakers is None:
        return own(*call)
    if getattr(backend, "SPEAKERS", False):
        return own(*call, speakers)
    return getattr(grouping, direction)(backend, *call, speakers)


def parts_of(weight: QuantizedTensor) -> tuple[Any, ...]:
    """The weight as operator arguments, in the order of `_WEIGHT`."""
    return (
        weight.codes,
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        list(weight.shape),
        weight.format,
        weight.block_size,
    )


def _linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    format: str,
    block_size: int,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    backend: str,
    speakers: Tensor | None,
    top_k: int | None = None,
    temperature: float | None = None,
) -> Tensor:
    weight = QuantizedTensor.from_parts(
        codes, absmax, nested_absmax, offset, shape, format, block_size
    )
    gating = None if temperature is None else (top_k, temperature)
    return forward(backend, x, weight, lora_a, lora_b, gates, bias, scaling, speakers, gating)


def _whole(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With the last two, None, which PyTorch leaves out where they are that."""
    return (*arguments, None, None)[:ARGUMENTS]


def _linear_kept(*arguments: Any) -> tuple[Tensor, ...]:
    """y, P [M, R] and a router's gates [M, E], both float32; empty ones where there are none."""
    x, *rest = _whole(arguments)
    *parts, lora_a, lora_b, gates, bias, scaling, backend, speakers, top_k, temperature = rest
    gating = None if temperature is None else (top_k, temperature)
    weight = QuantizedTensor.from_parts(*parts)
    keeping: Any = BACKENDS[backend]
    given = (x, weight, lora_a, lora_b, gates, bias, scaling, speakers, gating)
    found = keeping.forward_kept(*given)
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _linear_backward(
    dy: Tensor,
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    format: str,
    block_size: int,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    scaling: float,
    name: str,
    needs: list[bool],
    speakers: Tensor | None,
    top_k: int | None = None,
    temperature: float | None = None,
    plain: Tensor | None = None,
    made: Tensor | None = None,
) -> tuple[Tensor, ...]:
    weight = QuantizedTensor.from_parts(
        codes, absmax, nested_absmax, offset, shape, format, block_size
    )
    gating = None if temperature is None else (top_k, temperature)
    given = (dy, x, weight, lora_a, lora_b, gates, scaling, tuple(needs), speakers, gating)
    if plain is None:
        gradients = backward(name, *given)
    else:
        keeping: Any = BACKENDS[name]
        gradients = keeping.backward(*given, plain=plain, made=made)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _linear_fake(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[3][0])


def _linear_kept_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, *rest = _whole(arguments)
    (experts, rank), temperature = rest[7].shape[-3:-1], rest[-1]
    kept = {"dtype": torch.float32} if experts * rank else {}
    plain = x.new_empty((x.shape[0], experts * rank) if kept else 0, **kept)
    routed = bool(kept) and temperature is not None
    made = x.new_empty((x.shape[0], experts), **kept) if routed else x.new_empty(0)
    return _linear_fake(x, *rest), plain, made


def _linear_backward_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lora_a, lora_b, gates, needs = rest[7], rest[8], rest[9], rest[12]
    wanted = zip((x, lora_a, lora_b, gates), needs, strict=True)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, codes, absmax, nested_absmax, offset, *meta = inputs[:8]
    lora_a, lora_b, gates, bias, scaling, backend, speakers, *ctx.gating = inputs[8:]
    kept: tuple[Tensor | None, ...] = (None, None)
    if not isinstance(output, Tensor):
        ctx.mark_non_differentiable(*output[1:])
        kept = tuple(t if t.dim() == 2 else None for t in output[1:])
    ctx.save_for_backward(
        x, codes, absmax, nested_absmax, offset, lora_a, lora_b, gates, speakers, *kept
    )
    ctx.meta, ctx.scaling, ctx.backend = meta, scaling, backend
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, codes, absmax, nested_absmax, offset, lora_a, lora_b, gates, *more = ctx.saved_tensors
    speakers, plain, made = more
    positions = (0, 8, 9, 10)  # x, lora_a, lora_b, gates among the operator's arguments
    needs = [ctx.needs_input_grad[p] for p in positions]
    grads: list[Tensor | None] = [None] * ARGUMENTS
    if any(needs):
        gradients = torch.ops.saml_kernels.linear_backward(
            dy.contiguous(), x, codes, absmax, nested_absmax, offset, *ctx.meta,
            lora_a, lora_b, gates, ctx.scaling, ctx.backend, needs, speakers, *ctx.gating,
            plain, made,
        )  # fmt: skip
        for position, need, grad in zip(positions, needs, gradients, strict=True):
            grads[position] = grad if need else None
    if ctx.has_bias and ctx.needs_input_grad[11]:
        grads[11] = dy.sum(0)
    return tuple(grads)


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise SAMLError(NO_SECOND_ORDER)


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise SAMLError(
        "saml_linear: torch.func.vmap is not supported; give x a leading batch dimension instead"
    )


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("linear_kept", _linear_kept, "CompositeExplicitAutograd")
_library.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")
library.register_fake("saml_kernels::linear", _linear_fake, lib=_library)
library.register_fake("saml_kernels::linear_kept", _linear_kept_fake, lib=_library)
library.register_fake("saml_kernels::linear_backward", _linear_backward_fake, lib=_library)
for _name in ("linear", "linear_kept"):
    library.register_autograd(
        f"saml_kernels::{_name}", _gradients, setup_context=_save, lib=_library
    )
library.register_autograd("saml_kernels::linear_backward", _no_second_order, lib=_library)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in ("linear", "linear_kept", "linear_backward"):
        library.register_vmap(f"saml_kernels::{_name}", _no_vmap, lib=_library)
