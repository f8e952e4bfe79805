"""How a call runs: as it is, prepared for its layer, with gradients, or as an operator of torch's.

Compilers, exporters and transforms must see one of PyTorch's operators (registration.py). Eager
calls need none, and PyTorch's dispatcher takes longer over so many arguments than most products
take.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from saml_kernels.backends import grouping, reference
from saml_kernels.backends.cpu import backend as cpu
from saml_kernels.backends.reference import Gating, Gradients
from saml_kernels.backends.registry import BACKENDS, choose_backend
from saml_kernels.errors import SAMLError
from saml_kernels.ops import registration
from saml_kernels.ops.arguments import autocast_dtype, check
from saml_kernels.ops.autograd import Operator, learning
from saml_kernels.ops.prepared import Prepared
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["eager", "run"]

Experts = Tensor | QuantizedTensor
PLAIN = (Tensor, torch.nn.Parameter)

# By their own names: a token's call looks up nothing twice.
is_compiling, grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
dispatch_modes = torch._C._len_torch_dispatch_stack
transforms_active = torch._C._are_functorch_transforms_active
tracing_state = torch._C._get_tracing_state
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def run(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Experts,
    lora_b: Experts,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    gating: Gating | None,
    backend: str | None,
    speakers: Tensor | None,
) -> Tensor:
    """The operator; with `gating`, `gates` is a token router's weight. See `api.saml_linear`."""
    watched = not eager(x)
    if not watched:
        ready = weight.prepared
        if ready is not None and backend in (None, "triton") and x.device == ready.device:
            same = ready.holds(lora_a, lora_b, gates, bias, scaling, gating)
            if same and x.numel() and ready.serves(x, gates, bias):
                return ready(x, lora_a, lora_b, gates, bias, speakers)
        elif (backend is None or backend == "cpu") and not grad_enabled():
            y = cpu.forward_prepared(
                x, weight, lora_a, lora_b, gates, bias, scaling, gating, speakers
            )
            if y is not None:
                return y
    dtype = autocast_dtype(x)
    check(x, weight, lora_a, lora_b, gates, bias, speakers, gating, dtype)
    name = choose_backend(x if dtype is None else x.new_empty(0, dtype=dtype), weight, backend)
    tensors = (x, lora_a, lora_b, gates, bias, speakers)
    watched = watched or not all(map(_plain, tensors))
    if name == "triton" and not watched and x.numel():
        ready = Prepared(weight, lora_a, lora_b, gates, bias, scaling, gating)
        if ready.serves(x, gates, bias):
            weight.prepared = ready
            return ready(x, lora_a, lora_b, gates, bias, speakers)
    lora_a, lora_b = (
        t.dequantize(dtype or x.dtype) if isinstance(t, QuantizedTensor) else t
        for t in (lora_a, lora_b)
    )
    if gating is not None and (lora_a.shape[-3] == 0 or not _routes(name, speakers)):
        gates, gating = _gates(x, gates, gating, speakers, dtype), None
    if watched:
        if not torch.compiler.is_compiling():
            _refuse_transforms(*tensors)
        return _as_operator(
            name, x, weight, lora_a, lora_b, gates, bias, scaling, gating, speakers, dtype
        )
    call = _Plain(name, weight, float(scaling), gating, speakers, dtype or x.dtype)
    if learning(x, lora_a, lora_b, gates, bias):
        return Operator.apply(x, lora_a, lora_b, gates, bias, call)
    return call.forward(x, lora_a, lora_b, gates, bias)[0]


def eager(x: Tensor) -> bool:
    """Whether nothing watches: no compiler, tracer, dispatch mode, transform or tangent."""
    return not (
        is_compiling()
        or dispatch_modes()
        or transforms_active()
        or forward_ad._current_level >= 0
        or tracing_state() is not None
        or type(x) not in PLAIN
        or is_wrapped(x)
    )


def _plain(tensor: Any) -> bool:
    """Whether a tensor is no more than that."""
    return not isinstance(tensor, Tensor) or not (type(tensor) not in PLAIN or is_wrapped(tensor))


def _refuse_transforms(*tensors: Any) -> None:
    """Where PyTorch's operator would give a wrong derivative, or an error of somebody else's.

    Raises:
        SAMLError: a tensor is torch.func.grad's or jvp's, or has a tangent.
    """
    for tensor in tensors:
        if isinstance(tensor, Tensor) and (
            torch._C._functorch.is_gradtrackingtensor(tensor)
            or (
                forward_ad._current_level >= 0
                and forward_ad.unpack_dual(tensor).tangent is not None
            )
        ):
            raise SAMLError(
                "saml_linear: torch.func's derivatives and forward mode are not supported; "
                "use torch.autograd.grad or backward()"
            )


def _routes(name: str, speakers: Tensor | None) -> bool:
    """Whether a backend makes the gates of such a call itself."""
    backend = BACKENDS[name]
    knows = speakers is None or getattr(backend, "SPEAKERS", False)
    return knows and getattr(backend, "ROUTING", False)


def _gates(
    x: Tensor,
    router: Tensor,
    gating: Gating,
    speakers: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The gates [..., E] of a token router, made by PyTorch."""
    x, router = x.to(dtype or x.dtype), router.to(dtype or x.dtype)
    # Grouping looks at the index, which a compiler cannot trace, and needs a row to look at.
    few = speakers is None or 0 in (router.shape[-2], x.numel())
    if speakers is None or few or torch.compiler.is_compiling():
        return reference.route(x, router, *gating, speakers)
    logits = grouping.logits(x, router, speakers)
    return reference.gates_from_logits(logits, *gating).to(x.dtype)


def _rows(
    x: Tensor, gates: Tensor, gating: Gating | None, speakers: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x as [M, K], gates as [M, E] unless they are a router, and the speaker of each row."""
    lead = x.shape[:-1]
    rows = x.reshape(-1, x.shape[-1])
    if gating is None:
        experts = gates.shape[-1]
        gates = gates.expand(*lead, experts).reshape(rows.shape[0], experts)
    if speakers is not None:
        speakers = speakers.expand(lead).reshape(-1).to(torch.int32)
    return rows, gates, speakers


def _as_operator(
    name: str,
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    gating: Gating | None,
    speakers: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """By PyTorch's dispatcher; casts and broadcasts are operators of their own there."""
    lead = x.shape[:-1]
    if dtype is not None:
        x, lora_a, lora_b, gates = (t.to(dtype) for t in (x, lora_a, lora_b, gates))
        bias = None if bias is None else bias.to(dtype)
    rows, gates, speakers = _rows(x, gates, gating, speakers)
    y = registration.linear(
        name, rows, weight, lora_a, lora_b, gates, bias, float(scaling), speakers, gating
    )
    return y.view(*lead, y.shape[-1])


_latest: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; where layers side by side read the same x, as under autocast, one copy of it.

    It lives as long as a layer keeps it for its gradients.
    """
    global _latest
    if x.dtype == dtype:
        return x
    latest = _latest
    if latest is not None and latest[0]() is x and latest[1] == x._version:
        made = latest[2]()
        if made is not None and made.dtype == dtype:
            return made
    made = x.to(dtype)
    _latest = None if x.is_inference() else (weakref.ref(x), x._version, weakref.ref(made))
    return made


class _Plain:
    """A checked call of any backend."""

    def __init__(
        self,
        name: str,
        weight: QuantizedTensor,
        scaling: float,
        gating: Gating | None,
        speakers: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.name, self.weight, self.scaling, self.gating = name, weight, scaling, gating
        self.speakers, self.dtype = speakers, dtype

    def forward(
        self, x: Tensor, lora_a: Tensor, lora_b: Tensor, gates: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        lead, self.like = x.shape[:-1], (x.shape, x.dtype)
        x = _cast(x, self.dtype)
        rows, spread, speakers = _rows(x, gates.to(self.dtype), self.gating, self.speakers)
        bias = None if bias is None else bias.to(self.dtype)
        experts = (lora_a.to(self.dtype), lora_b.to(self.dtype))
        y = registration.forward(
            self.name, rows, self.weight, *experts, spread, bias, self.scaling, speakers,
            self.gating,
        )  # fmt: skip
        return y.view(*lead, y.shape[-1]), (x,)

    def backward(
        self,
        dy: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        gates: Tensor,
        kept: tuple[Tensor | None, ...],
        needs: tuple[bool, bool, bool, bool],
    ) -> Gradients:
        (x,) = kept
        assert x is not None
        rows, spread, speakers = _rows(x, gates.to(self.dtype), self.gating, self.speakers)
        experts = (lora_a.to(self.dtype), lora_b.to(self.dtype))
        dy = dy.reshape(-1, self.weight.shape[0])
        dx, da, db, dg = registration.backward(
            self.name, dy.contiguous(), rows, self.weight, *experts, spread, self.scaling,
            needs, speakers, self.gating,
        )  # fmt: skip
        if dg is not None and self.gating is None:
            dg = dg.view(*self.like[0][:-1], gates.shape[-1]).sum_to_size(gates.shape)
        shape, dtype = self.like
        return (
            None if dx is None else dx.view(shape).to(dtype),
            None if da is None else da.to(lora_a.dtype),
            None if db is None else db.to(lora_b.dtype),
            None if dg is None else dg.to(gates.dtype),
        )
