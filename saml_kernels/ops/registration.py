"""The custom operators `saml_kernels::linear` and `saml_kernels::linear_backward`.

One operator of PyTorch's carries every backend. It has a fake implementation (so that
`torch.compile(fullgraph=True)` traces through), an autograd formula, and refuses `vmap` by name.
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
from saml_kernels.ops.autograd import NO_SECOND_ORDER
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["backward", "forward", "linear", "parts_of"]

_WEIGHT = (
    "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, "
    "int[] shape, str format, int block_size"
)
# `gates` is [M, E]; where a temperature is given, the router [E, K] that makes them.
_EXPERTS = "Tensor lora_a, Tensor lora_b, Tensor gates"
_library = library.Library("saml_kernels", "DEF")
_library.define(
    f"linear(Tensor x, {_WEIGHT}, {_EXPERTS}, Tensor? bias, float scaling, str backend, "
    "Tensor? speakers, int? top_k=None, float? temperature=None) -> Tensor"
)
_library.define(
    f"linear_backward(Tensor dy, Tensor x, {_WEIGHT}, {_EXPERTS}, float scaling, str backend, "
    "bool[] needs, Tensor? speakers, int? top_k=None, float? temperature=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
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
    """y [M, N] by the operator `saml_kernels::linear`."""
    return torch.ops.saml_kernels.linear(
        rows, *parts_of(weight), lora_a, lora_b, gates, bias, scaling, name, speakers,
        *(gating or (None, None)),
    )  # fmt: skip


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
) -> tuple[Tensor, ...]:
    weight = QuantizedTensor.from_parts(
        codes, absmax, nested_absmax, offset, shape, format, block_size
    )
    gating = None if temperature is None else (top_k, temperature)
    gradients = backward(
        name, dy, x, weight, lora_a, lora_b, gates, scaling, tuple(needs), speakers, gating
    )
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _linear_fake(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[3][0])


def _linear_backward_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lora_a, lora_b, gates, needs = rest[7], rest[8], rest[9], rest[12]
    wanted = zip((x, lora_a, lora_b, gates), needs, strict=True)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, absmax, nested_absmax, offset, *meta = inputs[:8]
    lora_a, lora_b, gates, bias, scaling, backend, speakers, *ctx.gating = inputs[8:]
    ctx.save_for_backward(x, codes, absmax, nested_absmax, offset, lora_a, lora_b, gates, speakers)
    ctx.meta, ctx.scaling, ctx.backend = meta, scaling, backend
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, absmax, nested_absmax, offset, lora_a, lora_b, gates, speakers = ctx.saved_tensors
    positions = (0, 8, 9, 10)  # x, lora_a, lora_b, gates among the operator's arguments
    needs = [ctx.needs_input_grad[p] for p in positions]
    grads: list[Tensor | None] = [None] * 17
    if any(needs):
        gradients = torch.ops.saml_kernels.linear_backward(
            dy.contiguous(), x, codes, absmax, nested_absmax, offset, *ctx.meta,
            lora_a, lora_b, gates, ctx.scaling, ctx.backend, needs, speakers, *ctx.gating,
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
_library.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")
library.register_fake("saml_kernels::linear", _linear_fake, lib=_library)
library.register_fake("saml_kernels::linear_backward", _linear_backward_fake, lib=_library)
library.register_autograd("saml_kernels::linear", _gradients, setup_context=_save, lib=_library)
library.register_autograd("saml_kernels::linear_backward", _no_second_order, lib=_library)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in ("linear", "linear_backward"):
        library.register_vmap(f"saml_kernels::{_name}", _no_vmap, lib=_library)
