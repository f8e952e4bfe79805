"""The Triton backend: the weight decoded inside the product, the experts in its accumulator.

Five routes, chosen by shape from tuning tables (configs.py): `decode` takes a few tokens in two
launches (decode.py); `split` and `fused` decode the weight in the loop of one kernel (product.py)
after a pass of skinny.py; `dense` and `scratch` dequantise one layer to scratch and go on with the
same kernel (a dense product with the experts in its accumulator, which knows many speakers) or
leave one product over [X | H] and [W | B] to cuBLAS. The scratch is a block of PyTorch's caching
allocator: every layer and call of a stream gets the same one, nothing keeps it, and autograd never
sees it.

The mathematics and its names are those of `reference.py`. Nothing is kept for backward but the
operator's own arguments. To keep P would take 4 E r bytes of a token in every layer from forward to
backward; to project again reads its 2 K bytes of x once more (E r = 64 and K = 512, float16: 256
held against 1024 read, where autograd holds those 1024 anyway), and skips the store in forward.
`bench/gpu_check.py` times that pass ("projection") beside the whole backward.

Triton itself is imported at a kernel's first use (dispatch.py), so that the package works where
there is none.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saml_kernels.quant import FORMATS, QuantizedTensor
from saml_kernels.triton.configs import Config, choose, device_traits
from saml_kernels.triton.dispatch import interpreting, prebuilt

if TYPE_CHECKING:
    from saml_kernels.triton.launch import Experts, Router

__all__ = ["backward", "forward", "unsupported", "why_unavailable"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Routing = tuple[int | None, float]  # top k (None: all gates), temperature

SPEAKERS = True  # the kernels take the speaker index themselves
EIGHT_BIT = True  # read int8 experts as they lie
ROUTING = True  # and make the gates of a token router
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# Looked for here, because torch 2.11 can trace neither the search nor a cache around it.
_INSTALLED = find_spec("triton") is not None


def why_unavailable() -> str | None:
    """Why no Triton kernel can run on this machine."""
    if not _INSTALLED and (prebuilt() is None or interpreting()):
        return (
            "triton is not installed; pip install 'saml-kernels[triton]', or set SAML_KERNELS to "
            "a folder that python -m saml_kernels.aot made"
        )
    if not torch.cuda.is_available() and not interpreting():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def unsupported(x: Tensor, weight: QuantizedTensor) -> str | None:
    """Why these arguments cannot run."""
    wanted = "cpu" if interpreting() else "cuda"
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
    lora_a: Tensor | QuantizedTensor,
    lora_b: Tensor | QuantizedTensor,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
    speakers: Tensor | None = None,
    routing: Routing | None = None,
    route: str | Config | None = None,
) -> Tensor:
    """y [M, N]; arguments as in `reference.forward`.

    With `routing`, (top k or None, temperature), `gates` is the router's weight [E, K] ([S, E, K]
    with speakers). Experts may be int8 `QuantizedTensor`s, read as they lie. A row whose speaker
    is out of range comes back as NaN: asking first would synchronise. `route` overrides the
    tuning table's choice (one of `configs.ROUTES`, or a `Config` as it is).
    """
    from saml_kernels.triton.launch import decode, product, skinny

    n, k = weight.shape
    m = x.shape[0]
    if m == 0:
        return x.new_empty(0, n)
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    config = _config("forward", x, weight, speakers, route)
    a, b, r = _experts(lora_a, lora_b, speakers)
    router, gates = _router(x, gates, speakers, routing)
    if config.route == "decode" and a and b:
        given = gates if router is None else None
        return decode(x, weight, config, a, b, given, router, bias, scaling)
    if config.route == "scratch":
        wide = x.new_empty(m, k + r)
        wide[:, :k].copy_(x)
        scratch = _scratch(weight, x.dtype, r)
        if a and b:
            skinny(x, a, gates, scaling, router=router, gated=wide[:, k:])
            dense = lora_b.dequantize(x.dtype) if isinstance(lora_b, QuantizedTensor) else lora_b
            scratch[:, k:].view(n, a.count, a.rank).copy_(dense.transpose(0, 1))
        return torch.nn.functional.linear(wide, scratch, bias)
    hidden = None
    if a:
        hidden = x.new_empty(m, r)
        skinny(x, a, gates, scaling, router=router, gated=hidden)
    base = _base(weight, config, x.dtype)
    return product(x, base, config, transposed=False, hidden=hidden, experts=b, bias=bias)


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
    routing: Routing | None = None,
    route: str | Config | None = None,
) -> Gradients:
    """Gradients of (x, lora_a, lora_b, gates), each None where `needs` says so.

    With `routing` the last is the router's. Its logits Z = X V^T are treated as more projections:
    dX = [dY | dP | dZ] [W ; A ; V], and dA and dV are one product with X.
    """
    from saml_kernels.triton.launch import experts_gradient, product, router_gradient, skinny

    need_x, need_a, need_b, need_gates = needs
    n, k = weight.shape
    m = x.shape[0]
    a, b, r = _experts(lora_a, lora_b, speakers)
    if m == 0 or a is None or b is None:
        dx = torch.zeros_like(x) if need_x else None
        zeros = (torch.zeros_like(t) for t in (lora_a, lora_b, gates))
        da, db, dg = (z if need else None for z, need in zip(zeros, needs[1:], strict=True))
        if m and need_x:
            config = _config("backward", dy, weight, speakers, route)
            if config.route == "scratch":
                dx = dy @ _scratch(weight, dy.dtype, 0)
            else:
                base = _base(weight, config, dy.dtype)
                dx = product(dy.contiguous(), base, config, transposed=True)
        return dx, da, db, dg
    dy, x = dy.contiguous(), x.contiguous()
    router, gates = _router(x, gates, speakers, routing)
    through_gates = need_gates or (router is not None and need_x)
    plain = hidden = None
    if need_b or through_gates or router is not None:
        hidden = x.new_empty(m, r)
        plain = x.new_empty(m, r, dtype=torch.float32) if through_gates else None
        skinny(x, a, gates, scaling, router=router, gated=hidden, plain=plain)
    found = dg = dx = None
    down = a if router is None else _stacked(a, router)
    columns = down.count * down.rank
    config = _config("backward", dy, weight, speakers, route)
    if need_x or need_a or through_gates:
        wide = dy.new_empty(m, n + columns) if need_x and config.route == "scratch" else None
        small = dy.new_empty(m, columns) if wide is None else wide[:, n:]
        dg = torch.empty_like(gates) if through_gates else None
        skinny(
            dy, b, gates, scaling,
            gated=small[:, :r], projected=plain, dgates=dg, backward=True,
        )  # fmt: skip
        if router is not None:
            if dg is None:  # dA alone is wanted: the router's columns count for nothing
                small[:, r:].zero_()
            else:
                router_gradient(gates, dg, router.temperature, small[:, r:])
        if wide is not None:
            wide[:, :n].copy_(dy)
            scratch = dy.new_empty(n + columns, k)
            _fill(weight, scratch)
            scratch[n:].copy_(down.tensor.reshape(columns, k))
            dx = wide @ scratch
        elif need_x:
            base = _base(weight, config, dy.dtype)
            dx = product(dy, base, config, transposed=True, hidden=small, experts=down)
        found = small.contiguous()
    da = db = None
    if found is not None and (need_a or (router is not None and need_gates)):
        both = experts_gradient(found, x, down).view(len(down.tensor), columns, k)
        da = both[:, :r].reshape_as(lora_a) if need_a else None
        if router is not None:
            dg = both[:, r:].reshape(*lora_a.shape[:-2], k)
    if need_b and hidden is not None:
        db = experts_gradient(hidden, dy, b).view_as(lora_b)
    return dx, da, db, dg if need_gates else None


def _config(
    direction: str,
    x: Tensor,
    weight: QuantizedTensor,
    speakers: Tensor | None,
    route: str | Config | None,
) -> Config:
    n, k = weight.shape
    config = (
        route
        if isinstance(route, Config)
        else choose(direction, x.shape[0], n, k, *device_traits(x.device))
    )
    if isinstance(route, str):
        split = config.split if route in ("decode", "split") else 1
        config = replace(config, route=route, split=split)
    if speakers is not None and config.route == "scratch":
        # [W | B] has room for one speaker's experts.
        config = replace(config, route="dense")
    return config


def _experts(
    lora_a: Tensor | QuantizedTensor, lora_b: Tensor | QuantizedTensor, speakers: Tensor | None
) -> tuple[Experts | None, Experts | None, int]:
    """(A, B, R) as the kernels take them; (None, None, 0) where there are none."""
    from saml_kernels.triton.launch import Experts

    if 0 in lora_a.shape[-3:-1]:
        return None, None, 0
    index = None if speakers is None else speakers.to(torch.int32).contiguous()
    made = []
    for tensor, is_a in ((lora_a, True), (lora_b, False)):
        shape = tensor.shape if speakers is not None else (1, *tensor.shape)
        if isinstance(tensor, QuantizedTensor):
            codes = tensor.codes.view(shape)
            made.append(Experts(codes, is_a, index, tensor.absmax, tensor.block_size))
        else:
            made.append(Experts(tensor.contiguous().view(shape), is_a, index))
    a, b = made
    return a, b, a.count * a.rank


def _router(
    x: Tensor, gates: Tensor, speakers: Tensor | None, routing: Routing | None
) -> tuple[Router | None, Tensor]:
    """(router, gates): with `routing`, the former, and empty float32 gates to be filled."""
    from saml_kernels.triton.launch import Router

    if routing is None:
        return None, gates.contiguous()
    weight = (gates if speakers is not None else gates.unsqueeze(0)).contiguous()
    made = x.new_empty(x.shape[0], weight.shape[1], dtype=torch.float32)
    return Router(weight, *routing), made


def _stacked(a: Experts, router: Router) -> Experts:
    """[A ; V] as R + E experts of rank 1: [S, R + E, 1, K]."""
    from saml_kernels.triton.launch import Experts

    speakers, k = len(a.tensor), a.tensor.shape[-1]
    rows = torch.cat((a.tensor.reshape(speakers, -1, k), router.weight), 1)
    return Experts(rows.unsqueeze(2), True, a.speakers)


def _base(weight: QuantizedTensor, config: Config, dtype: torch.dtype) -> QuantizedTensor | Tensor:
    """What the product reads: the weight as it lies, or dequantised to scratch."""
    return _scratch(weight, dtype, 0) if config.route == "dense" else weight


def _scratch(weight: QuantizedTensor, dtype: torch.dtype, extra: int) -> Tensor:
    """[N, K + extra] with the weight in its first columns."""
    n, k = weight.shape
    out = torch.empty(n, k + extra, dtype=dtype, device=weight.device)
    _fill(weight, out)
    return out


def _fill(weight: QuantizedTensor, out: Tensor) -> None:
    from saml_kernels.triton.launch import dequantize_into

    dequantize_into(weight, out)
