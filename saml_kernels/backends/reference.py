"""The operator in plain PyTorch: the specification that every backend is tested against.

Shapes: tokens M, in-features K, out-features N, experts E, rank r, R = E * r.

    P  = X A^T                      [M, R]   A = lora_a [E, r, K] stacked to [R, K]
    H  = P * repeat(G, r)           [M, R]   G = gates [M, E]
    Y  = X W^T + s H B^T + bias     [M, N]   B = lora_b [E, N, r] laid side by side to [N, R]

Backward, with W frozen:

    dH = s dY B       dP = dH * repeat(G, r)       dG[m, e] = sum_j P[m, e, j] dH[m, e, j]
    dX = dY W + dP A         dA = dP^T X                    dB = s dY^T H

Source: SAML (arXiv 2406.19706), equation of the mixture of LoRA experts over a frozen NF4 weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = [
    "Gating",
    "Gradients",
    "backward",
    "everybodys_logits",
    "forward",
    "gates_from_logits",
    "route",
    "saml_linear_reference",
    "unsupported",
    "why_unavailable",
]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Gating = tuple[int | None, float]  # of a token router: top k (None: all gates), temperature


def stack_a(lora_a: Tensor) -> Tensor:
    """[E, r, K] -> [R, K]."""
    return lora_a.reshape(-1, lora_a.shape[-1])


def stack_b(lora_b: Tensor) -> Tensor:
    """[E, N, r] -> [N, R]."""
    experts, out_features, rank = lora_b.shape
    return lora_b.permute(1, 0, 2).reshape(out_features, experts * rank)


def gates_from_logits(logits: Tensor, top_k: int | None = None, temperature: float = 1.0) -> Tensor:
    """Softmax in float32 (or wider), over the `top_k` largest alone where given.

    Args:
        logits: [..., E].
        top_k: gates to keep, the first of equals; their softmax is the whole one's share of them,
            renormalised.
        temperature: the logits are divided by it.

    Returns:
        [..., E], float32 or float64, zero where not kept.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    probabilities = torch.softmax(wide / temperature, dim=-1)
    if top_k is None or top_k >= probabilities.shape[-1]:
        return probabilities
    # Not topk, which takes any of equals: a router that has learnt nothing yet has only those.
    index = probabilities.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    values = probabilities.gather(-1, index)
    values = values / values.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, index, values)


def route(
    x: Tensor,
    router: Tensor,
    top_k: int | None = None,
    temperature: float = 1.0,
    speakers: Tensor | None = None,
) -> Tensor:
    """Gates [..., E] of tokens by a linear map of each, in the dtype of `x`.

    Args:
        x: [..., K].
        router: [E, K]; with `speakers` (whose router a row uses, [...]) [S, E, K].
        top_k, temperature: see `gates_from_logits`.
        speakers: integers, or None.
    """
    logits = F.linear(x, router) if speakers is None else everybodys_logits(x, router, speakers)
    return gates_from_logits(logits, top_k, temperature).to(x.dtype)


def everybodys_logits(x: Tensor, router: Tensor, speakers: Tensor) -> Tensor:
    """x V_s^T, s the speaker of a row: x [..., K], router [S, E, K], speakers [...] -> [..., E].

    All routers are applied, and of each row its speaker's are taken.
    """
    count, experts, _ = router.shape
    everyone = F.linear(x, router.flatten(0, 1)).unflatten(-1, (count, experts))
    # An index out of range is the backend's to report.
    index = speakers.clamp(0, count - 1).long().expand(x.shape[:-1])[..., None, None]
    return everyone.gather(-2, index.expand(*x.shape[:-1], 1, experts)).squeeze(-2)


def saml_linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """The forward equation on a dequantised weight, differentiable by autograd in any dtype.

    Args:
        x: [M, K].
        weight: [N, K], already dequantised.
        lora_a: [E, r, K].
        lora_b: [E, N, r].
        gates: [M, E].
        bias: [N] or None.
        scaling: s, usually alpha / r.

    Returns:
        [M, N] in the dtype of `x`.
    """
    y = F.linear(x, weight, bias)
    if lora_a.shape[0] == 0:
        return y
    return y + scaling * experts_forward(x, lora_a, lora_b, gates)


def experts_forward(x: Tensor, lora_a: Tensor, lora_b: Tensor, gates: Tensor) -> Tensor:
    """H B^T [M, N], without the base."""
    hidden = F.linear(x, stack_a(lora_a)) * gates.repeat_interleave(lora_a.shape[1], dim=-1)
    return F.linear(hidden, stack_b(lora_b))


def forward(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    """The backend's forward: dequantise, then the equation. Shapes as in the module's docstring."""
    dense = weight.dequantize(x.dtype)
    return saml_linear_reference(x, dense, lora_a, lora_b, gates, bias, scaling)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    scaling: float,
    needs: tuple[bool, bool, bool, bool],
) -> Gradients:
    """The chain rule written out; `needs` says which of (x, lora_a, lora_b, gates) want one."""
    dx = dy @ weight.dequantize(dy.dtype) if needs[0] else None
    if lora_a.shape[0] == 0:
        zeros = (torch.zeros_like(t) for t in (lora_a, lora_b, gates))
        da, db, dg = (z if need else None for z, need in zip(zeros, needs[1:], strict=True))
        return dx, da, db, dg
    return experts_backward(dy, x, lora_a, lora_b, gates, scaling, needs, dx)


def experts_backward(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    scaling: float,
    needs: tuple[bool, bool, bool, bool],
    base: Tensor | None = None,
) -> Gradients:
    """The experts' part of `backward`, all tensors in one dtype.

    Args:
        dy, x, lora_a, lora_b, gates, scaling, needs: as in `backward`.
        base: dY W [M, K], to which the experts' part of dX is added in place; None is zero.
    """
    need_x, need_a, need_b, need_gates = needs
    experts, rank, _ = lora_a.shape
    a, b = stack_a(lora_a), stack_b(lora_b)
    repeated = gates.repeat_interleave(rank, dim=-1)
    dx, da, db, dg = base, None, None, None
    if need_x or need_a or need_gates:
        dh = (dy @ b).mul_(scaling)
        dp = dh * repeated
        if need_x:
            dx = dp @ a if base is None else base.addmm_(dp, a)
        if need_a:
            da = (dp.T @ x).view_as(lora_a)
    if need_b or need_gates:
        projected = x @ a.T
        if need_b:
            stacked = ((projected * repeated).T @ dy).mul_(scaling)  # [R, N], the faster way round
            db = stacked.view(experts, rank, len(b)).transpose(1, 2).contiguous()
        if need_gates:  # R numbers are summed: in float32 at least
            wide = projected if projected.dtype == torch.float64 else projected.float()
            dg = (wide * dh).view(len(x), experts, rank).sum(-1).to(gates.dtype)
    return dx, da, db, dg


def why_unavailable() -> str | None:
    """None: it runs everywhere."""
    return None


def unsupported(x: Tensor, weight: QuantizedTensor) -> str | None:
    """The reference runs everything that PyTorch runs."""
    return None
