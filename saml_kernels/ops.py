"""`saml_linear`: the operator as PyTorch sees it, and the choice of backend.

One custom operator of PyTorch's carries every backend. It has a fake implementation (so that
`torch.compile(fullgraph=True)` traces through), an autograd formula, and refuses `vmap` by name.
Autocast is applied in `saml_linear`, because the scales of the weight must stay float32.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from saml_kernels import cpu, grouping, reference, triton
from saml_kernels.arguments import check
from saml_kernels.errors import SAMLError
from saml_kernels.quant import QuantizedTensor

__all__ = [
    "autocast_dtype",
    "available_backends",
    "choose_backend",
    "saml_linear",
    "saml_linear_routed",
    "why_unavailable",
]

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": triton}
# Which backend a device's tensors go to first; what it cannot run goes to the reference.
PREFERRED = {"cpu": "cpu", "cuda": "triton"}

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


def why_unavailable(name: str) -> str | None:
    """Why backend `name` cannot run on this machine, or None if it can."""
    reason = getattr(BACKENDS[name], "why_unavailable", None)
    return reason() if reason else None


def available_backends() -> tuple[str, ...]:
    """Names of the backends that run on this machine, the specification first."""
    return tuple(name for name in BACKENDS if why_unavailable(name) is None)


def choose_backend(x: Tensor, weight: QuantizedTensor, backend: str | None = None) -> str:
    """Name of the backend that will run this call.

    Raises:
        SAMLError: `backend` is unknown, not available here, or cannot run these arguments.
    """
    if backend is None:
        name = PREFERRED.get(x.device.type, "reference")
        usable = why_unavailable(name) is None and BACKENDS[name].unsupported(x, weight) is None
        return name if usable else "reference"
    if backend not in BACKENDS:
        raise SAMLError(f"backend: {backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    reason = why_unavailable(backend) or BACKENDS[backend].unsupported(x, weight)
    if reason:
        raise SAMLError(f"backend: {backend!r} cannot run this call: {reason}")
    return backend


# Asked here, because torch 2.11 cannot trace the question. The meta device, for one, has none.
AUTOCAST_DEVICES = frozenset(
    name
    for name in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla")
    if torch.amp.is_autocast_available(name)
)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute with `x` in; None where it is off or leaves `x` alone."""
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def saml_linear(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor | QuantizedTensor,
    lora_b: Tensor | QuantizedTensor,
    gates: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    backend: str | None = None,
    speakers: Tensor | None = None,
) -> Tensor:
    """y = x W^T + scaling * sum_e gates_e (x A_e^T) B_e^T + bias, with W frozen in low bits.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64.
        weight: quantised [N, K]; never receives a gradient.
        lora_a: [E, r, K], the dtype of `x` (E = 0 leaves the base alone); or both experts
            frozen in 8 bits: `quantize(lora_a, "int8", 128, double_quant=False)`. The Triton
            kernels read those as they lie where no gradient is wanted.
        lora_b: [E, N, r], the dtype of `x`.
        gates: [..., E], broadcast over the leading dimensions of `x`; differentiable.
        bias: [N] or None.
        scaling: s, usually alpha / r.
        backend: one of `available_backends()`; None takes the fastest that can run the call.
        speakers: int32 or int64 [...], broadcast over the leading dimensions of `x`: whose experts
            a row uses. lora_a is then [S, E, r, K] and lora_b [S, E, N, r]. An index out of range
            is an error; the Triton kernels, which cannot ask without a synchronisation, return NaN
            for such a row.

    Returns:
        [..., N] in the dtype of `x` (of autocast, where that is on).

    Raises:
        SAMLError: a shape, dtype or device does not fit, or the backend cannot run the call.
    """
    if backend in (None, "cpu") and speakers is None and _only_result(x):
        y = cpu.quick(x, weight, lora_a, lora_b, gates, None, bias, scaling)
        if y is not None:
            return y
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, gates = x.to(dtype), gates.to(dtype)
        lora_a, lora_b = _cast(lora_a, dtype), _cast(lora_b, dtype)
        bias = None if bias is None else bias.to(dtype)
    check(x, weight, lora_a, lora_b, gates, bias, speakers)
    lead = x.shape[:-1]
    experts = gates.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    gates = gates.expand(*lead, experts).reshape(rows.shape[0], experts)
    if speakers is not None:
        speakers = speakers.expand(lead).reshape(-1).to(torch.int32)
    name = choose_backend(x, weight, backend)
    y = _call(name, rows, weight, lora_a, lora_b, gates, bias, scaling, speakers, None)
    return y.view(*lead, y.shape[-1])


def saml_linear_routed(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor | QuantizedTensor,
    lora_b: Tensor | QuantizedTensor,
    router: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    top_k: int | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
    speakers: Tensor | None = None,
) -> Tensor:
    """`saml_linear` with the gates of a token router: softmax(x V^T / temperature), V = router.

    The Triton kernels make the gates in the pass over x that projects it; the other backends make
    them first.

    Args:
        x, weight, lora_a, lora_b, bias, scaling, backend, speakers: as in `saml_linear`.
        router: [E, K], the dtype of `x`; with `speakers` [S, E, K]; differentiable.
        top_k: keep this many gates of a token, renormalised; None keeps all.
        temperature: the logits are divided by it.

    Returns:
        [..., N] in the dtype of `x` (of autocast, where that is on).

    Raises:
        SAMLError: as `saml_linear`; a top_k outside 1..E; a temperature that is not positive.
    """
    if backend in (None, "cpu") and speakers is None and _only_result(x):
        y = cpu.quick(x, weight, lora_a, lora_b, None, router, bias, scaling, top_k, temperature)
        if y is not None:
            return y
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, router = x.to(dtype), router.to(dtype)
        lora_a, lora_b = _cast(lora_a, dtype), _cast(lora_b, dtype)
        bias = None if bias is None else bias.to(dtype)
    experts = lora_a.shape[-3] if len(lora_a.shape) >= 3 else 0
    wanted = (*lora_a.shape[:-3], experts, x.shape[-1] if x.dim() else 0)
    if tuple(router.shape) != wanted:
        raise SAMLError(f"router: shape {tuple(router.shape)}; expected {wanted}")
    if top_k is not None and not 1 <= top_k <= experts:
        raise SAMLError(f"top_k: {top_k}; expected 1..{experts} or None")
    if not 0.0 < temperature < float("inf"):
        raise SAMLError(f"temperature: {temperature}; expected a positive number")
    if router.dtype != x.dtype or router.device != x.device:
        raise SAMLError(
            f"router: {router.dtype} on {router.device}; expected {x.dtype} on {x.device}, as x"
        )
    name = choose_backend(x, weight, backend)
    if not getattr(BACKENDS[name], "ROUTING", False) or experts == 0:
        # Grouping looks at the index, which a compiler cannot trace, and needs a row to look at.
        if speakers is None or 0 in (experts, x.numel()) or torch.compiler.is_compiling():
            gates = reference.route(x, router, top_k, temperature, speakers)
        else:
            logits = grouping.logits(x, router, speakers)
            gates = reference.gates_from_logits(logits, top_k, temperature).to(x.dtype)
        return saml_linear(x, weight, lora_a, lora_b, gates, bias, scaling, backend, speakers)
    check(x, weight, lora_a, lora_b, x.new_empty(experts), bias, speakers)
    lead = x.shape[:-1]
    rows = x.reshape(-1, x.shape[-1])
    if speakers is not None:
        speakers = speakers.expand(lead).reshape(-1).to(torch.int32)
    routing = (top_k, float(temperature))
    y = _call(name, rows, weight, lora_a, lora_b, router, bias, scaling, speakers, routing)
    return y.view(*lead, y.shape[-1])


Routing = tuple[int | None, float]  # top k, temperature


def _call(
    name: str,
    rows: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor | QuantizedTensor,
    lora_b: Tensor | QuantizedTensor,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    speakers: Tensor | None,
    routing: Routing | None,
) -> Tensor:
    """Straight to the backend where nothing but the result is wanted, else by the dispatcher."""
    scaling = float(scaling)
    if isinstance(lora_a, QuantizedTensor) or isinstance(lora_b, QuantizedTensor):
        as_they_lie = (
            getattr(BACKENDS[name], "EIGHT_BIT", False)
            and all(isinstance(t, QuantizedTensor) for t in (lora_a, lora_b))
            and _plain_call(rows, gates, bias)
        )
        if as_they_lie:
            return _forward(
                name, rows, weight, lora_a, lora_b, gates, bias, scaling, speakers, routing
            )
        lora_a, lora_b = (
            t.dequantize(rows.dtype) if isinstance(t, QuantizedTensor) else t
            for t in (lora_a, lora_b)
        )
    if _plain_call(rows, lora_a, lora_b, gates, bias):
        return _forward(name, rows, weight, lora_a, lora_b, gates, bias, scaling, speakers, routing)
    return torch.ops.saml_kernels.linear(
        rows, *_parts(weight), lora_a, lora_b, gates, bias, scaling, name, speakers,
        *(routing or (None, None)),
    )  # fmt: skip


def _forward(name: str, *arguments: Any) -> Tensor:
    """The backend's forward; the last arguments are the speaker index and the routing, or None."""
    backend: Any = BACKENDS[name]
    *call, speakers, routing = arguments
    if routing is not None:
        return backend.forward(*call, speakers, routing)
    if speakers is None:
        return backend.forward(*call)
    if getattr(backend, "SPEAKERS", False):
        return backend.forward(*call, speakers)
    everything: list[Any] = [backend, *call, speakers]
    return grouping.forward(*everything)


def _only_result(x: Tensor) -> bool:
    """Whether a call is as plain as can be: no gradients, no autocast, no tracing, no transform."""
    return not (
        torch.is_grad_enabled()
        or type(x) is not Tensor
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _plain_call(*tensors: Tensor | None) -> bool:
    """Whether nothing but the result is wanted: no gradient, no tracing, no transform.

    PyTorch's dispatcher takes longer over one token than the product itself, so it is asked only
    where it has something to do.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    learning = torch.is_grad_enabled()
    return all(
        t is None
        or not (
            (learning and t.requires_grad)
            or type(t) not in (Tensor, torch.nn.Parameter)
            or torch._C._functorch.is_functorch_wrapped_tensor(t)
        )
        for t in tensors
    )


def _parts(weight: QuantizedTensor) -> tuple[Any, ...]:
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


def _cast(experts: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor | QuantizedTensor:
    return experts if isinstance(experts, QuantizedTensor) else experts.to(dtype)


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
    routing = None if temperature is None else (top_k, temperature)
    return _forward(backend, x, weight, lora_a, lora_b, gates, bias, scaling, speakers, routing)


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
    backend: str,
    needs: list[bool],
    speakers: Tensor | None,
    top_k: int | None = None,
    temperature: float | None = None,
) -> tuple[Tensor, ...]:
    weight = QuantizedTensor.from_parts(
        codes, absmax, nested_absmax, offset, shape, format, block_size
    )
    wanted = (needs[0], needs[1], needs[2], needs[3])
    arguments = (dy, x, weight, lora_a, lora_b, gates, scaling, wanted)
    module = BACKENDS[backend]
    if temperature is not None:
        found = module.backward(*arguments, speakers, (top_k, temperature))
    elif speakers is None:
        found = module.backward(*arguments)
    elif getattr(module, "SPEAKERS", False):
        found = module.backward(*arguments, speakers)
    else:
        found = grouping.backward(module, *arguments, speakers)
    return tuple(x.new_empty(0) if g is None else g for g in found)


def _linear_fake(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[3][0])


def _linear_backward_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lora_a, lora_b, gates, needs = rest[7], rest[8], rest[9], rest[12]
    wanted = zip((x, lora_a, lora_b, gates), needs, strict=True)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, absmax, nested_absmax, offset, *meta = inputs[:8]
    lora_a, lora_b, gates, bias, scaling, backend, speakers, *ctx.routing = inputs[8:]
    ctx.save_for_backward(x, codes, absmax, nested_absmax, offset, lora_a, lora_b, gates, speakers)
    ctx.meta, ctx.scaling, ctx.backend = meta, scaling, backend
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, absmax, nested_absmax, offset, lora_a, lora_b, gates, speakers = ctx.saved_tensors
    positions = (0, 8, 9, 10)  # x, lora_a, lora_b, gates among the operator's arguments
    needs = [ctx.needs_input_grad[p] for p in positions]
    shape, format, block_size = ctx.meta
    grads: list[Tensor | None] = [None] * 17
    if any(needs):
        found = torch.ops.saml_kernels.linear_backward(
            dy.contiguous(),
            x,
            codes,
            absmax,
            nested_absmax,
            offset,
            shape,
            format,
            block_size,
            lora_a,
            lora_b,
            gates,
            ctx.scaling,
            ctx.backend,
            needs,
            speakers,
            *ctx.routing,
        )
        for position, need, grad in zip(positions, needs, found, strict=True):
            grads[position] = grad if need else None
    if ctx.has_bias and ctx.needs_input_grad[11]:
        grads[11] = dy.sum(0)
    return tuple(grads)


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise SAMLError("saml_linear: second derivatives are not supported; detach the gradient")


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
