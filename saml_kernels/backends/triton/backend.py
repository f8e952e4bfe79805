"""The Triton backend: the weight decoded inside the product, the experts in its accumulator.

Seven routes, chosen by shape from measured tables or a cost model (configs.py): `single` takes up
to a few hundred tokens in one launch (kernels/single.py), `decode` in two (kernels/decode.py);
`split` and `fused` decode the weight in the loop of one kernel (kernels/product.py) after one pass
over x that projects it on the experts (kernels/projection.py); `dense` and `scratch` dequantise one
layer to scratch (kernels/dequantize.py) and go on with the same kernel (a dense product with the
experts in its accumulator, which knows many speakers) or leave one product over [X | H] and [W | B]
to cuBLAS; `stacked` leaves it X [W ; A]^T, and adds the experts in one pass over the result
(stacked.py), so that x is not copied. From Hopper on the dense product may be a persistent one,
whose tiles the tensor memory accelerator copies (`Config.loads`). The scratch is a block of
PyTorch's caching allocator: every layer and call of a stream gets the same one, nothing keeps it,
and autograd never sees it. Whatever the route, forward is at most three launches (four with a cast
of x), and backward at most four, two of which read dY (plan.py).

The weight's scales are read in float32 (quantization/layout.py), made when it moves to a GPU.
Experts, router and bias are read as they lie, in float32 or in the type of x. Where gradients are
wanted, P and the gates stay from forward to backward, 4 (R + E) bytes of a token beside the 2 K
bytes of x that autograd holds anyway: to project again would read x once more.

Triton itself is imported at a kernel's first use (launcher.py), so that the package works where
there is none.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from saml_kernels.backends.reference import Gating, Gradients
from saml_kernels.backends.triton.configs import Config, device_traits
from saml_kernels.backends.triton.facts import Facts, Strides, weight_parts
from saml_kernels.backends.triton.launcher import (
    interpreting,
    on_device,
    prebuilt,
    precision,
    standing_in,
)
from saml_kernels.backends.triton.plan import backward_plan, forward_plan
from saml_kernels.backends.triton.signature import ALIGNMENT
from saml_kernels.backends.triton.steps import Fill
from saml_kernels.errors import install
from saml_kernels.quantization.tensor import FORMATS, QuantizedTensor

__all__ = [
    "backward",
    "dequantize",
    "expert_parts",
    "facts_of",
    "forward",
    "forward_kept",
    "unsupported",
    "why_unavailable",
]

Experts = Tensor | QuantizedTensor

SPEAKERS = True  # the kernels take the speaker index themselves
EIGHT_BIT = True  # read int8 experts as they lie
ROUTING = True  # and make the gates of a token router
KEEPS = True  # P and the gates, for a backward
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# Looked for here, because torch 2.11 can trace neither the search nor a cache around it.
_INSTALLED = find_spec("triton") is not None


def why_unavailable() -> str | None:
    """Why no Triton kernel can run on this machine."""
    if not _INSTALLED and (prebuilt() is None or interpreting()):
        return (
            f"triton is not installed; {install('triton')}, or set SAML_KERNELS to a folder that "
            "python -m saml_kernels.aot made"
        )
    if not torch.cuda.is_available() and not standing_in():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def unsupported(x: Tensor, weight: QuantizedTensor) -> str | None:
    """Why these arguments cannot run."""
    wanted = "cpu" if standing_in() else "cuda"
    if x.device.type != wanted or weight.codes.device.type != wanted:
        return f"x is on {x.device}, the weight on {weight.codes.device}; expected {wanted}"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; it takes float16, bfloat16 and float32"
    if weight.format not in FORMATS:
        return f"the weight is {weight.format}; it takes {', '.join(FORMATS)}"
    return None


def forward(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Experts,
    lora_b: Experts,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    speakers: Tensor | None = None,
    routing: Gating | None = None,
    route: str | Config | None = None,
) -> Tensor:
    """y [M, N]; arguments as in `reference.forward`.

    With `routing`, (top k or None, temperature), `gates` is the router's weight [E, K] ([S, E, K]
    with speakers). Experts may be int8 `QuantizedTensor`s, read as they lie, or of another dtype
    than x. A row whose speaker is out of range comes back as NaN: asking first would synchronise.
    `route` overrides the tuning table's choice (one of `configs.ROUTES`, or a `Config` as it is).
    """
    given = (x, weight, lora_a, lora_b, gates, bias, scaling, speakers, routing)
    return forward_kept(*given, route, keep=False)[0]


def forward_kept(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Experts,
    lora_b: Experts,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    speakers: Tensor | None = None,
    routing: Gating | None = None,
    route: str | Config | None = None,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N]; P [M, R] and a router's gates [M, E] in float32, None where there are none.

    Without `keep` there are none.
    """
    x, gates = x.contiguous(), gates.contiguous()
    facts = facts_of(x, weight, lora_a, lora_b, gates, bias, speakers, routing, route=route)
    if facts.m == 0:
        keep = keep and facts.columns > 0
        plain = x.new_empty((0, facts.columns), dtype=torch.float32) if keep else None
        routed = keep and facts.gating is not None
        made = x.new_empty((0, facts.experts), dtype=torch.float32) if routed else None
        return x.new_empty(0, facts.n), plain, made
    given = (*expert_parts(lora_a), *expert_parts(lora_b), gates, bias, speakers, float(scaling))
    with on_device(x.device):
        return forward_plan(facts, keep)(x, weight_parts(weight), *given)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    scaling: float,
    needs: tuple[bool, bool, bool, bool],
    speakers: Tensor | None = None,
    routing: Gating | None = None,
    route: str | Config | None = None,
    plain: Tensor | None = None,
    made: Tensor | None = None,
) -> Gradients:
    """Gradients of (x, lora_a, lora_b, gates), each None where `needs` says so.

    With `routing` the last is the router's. Its logits Z = X V^T are treated as more projections:
    dX = dY W + [dP | dZ] [A ; V], and dA and dV are one product with X. `route` is that of dX;
    `plain` and `made` are what `forward_kept` kept.
    """
    if x.shape[0] == 0:
        zeros = (torch.zeros_like(t) for t in (x, lora_a, lora_b, gates))
        dx, da, db, dg = (z if need else None for z, need in zip(zeros, needs, strict=True))
        return dx, da, db, dg
    dy, x, gates = dy.contiguous(), x.contiguous(), gates.contiguous()
    facts = facts_of(x, weight, lora_a, lora_b, gates, None, speakers, routing, dy=dy, route=route)
    plan = backward_plan(facts, tuple(needs), plain is not None)
    given = (lora_a, lora_b, gates, speakers, float(scaling), plain, made)
    with on_device(x.device):
        return plan(dy, x, weight_parts(weight), *given)


def dequantize(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] by the kernel that fills scratch."""
    n, k = weight.shape
    x = torch.empty(1, k, dtype=dtype, device=weight.device)
    none = (x.new_empty(0, 1, k), x.new_empty(0, n, 1), x.new_empty(0))
    facts = facts_of(x, weight, *none, None, None, None)
    with on_device(x.device):
        return Fill(facts)(weight_parts(weight), x)


def facts_of(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Experts,
    lora_b: Experts,
    gates: Tensor,
    bias: Tensor | None,
    speakers: Tensor | None,
    routing: Gating | None,
    *,
    spans: tuple[int, int] = (1, 1),
    dy: Tensor | None = None,
    dtype: torch.dtype | None = None,
    route: str | Config | None = None,
) -> Facts:
    """What the plan of a call depends on.

    Args:
        x: [..., K]; the others as in `forward`.
        spans: rows of x that share a row of `gates`, and an entry of `speakers`.
        dy: given for a backward.
        dtype: what x will have been cast to.
        route: see `forward`.
    """
    a, b = (expert_parts(t)[0] for t in (lora_a, lora_b))
    count, rank = lora_a.shape[-3:-1]
    if 0 in (count, rank):
        count = rank = 0
    n, k = weight.shape
    given = (*weight_parts(weight), a, b, gates, bias, speakers, dy)
    kinds = tuple(None if t is None else (t.dtype, _aligned(t)) for t in given)
    cast = dtype is not None and dtype != x.dtype
    return Facts(
        x.numel() // k, n, k, dtype or x.dtype, weight.format, weight.block_size,
        count, rank, 0 if speakers is None else lora_a.shape[0],
        _strides(lora_a, False), _strides(lora_b, True), _block(lora_a), _block(lora_b),
        routing if count else None, *spans, bias is not None, precision(dtype or x.dtype),
        x.device, device_traits(x.device), (*kinds, cast or _aligned(x)), route,
    )  # fmt: skip


def _aligned(tensor: Tensor) -> bool:
    if tensor.is_meta:
        return tensor.storage_offset() * tensor.itemsize % ALIGNMENT == 0
    return tensor.data_ptr() % ALIGNMENT == 0


def expert_parts(experts: Experts) -> tuple[Tensor, Tensor | None]:
    """The experts' elements, and the scales of int8 ones."""
    if isinstance(experts, QuantizedTensor):
        return experts.codes, experts.absmax
    return experts, None


def _block(experts: Experts) -> int:
    return experts.block_size if isinstance(experts, QuantizedTensor) else 0


def _strides(experts: Experts, is_b: bool) -> Strides:
    """Of speaker, expert, direction within the expert, feature."""
    if isinstance(experts, QuantizedTensor):
        count, one, two = experts.shape[-3:]
        s, e, first, second = count * one * two, one * two, two, 1
    else:
        s, e, first, second = (0, *experts.stride())[-4:]
    return (s, e, second, first) if is_b else (s, e, first, second)
