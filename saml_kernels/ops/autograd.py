"""The operator's eager form: one autograd function over what a backend has prepared."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from saml_kernels.backends.reference import Gradients
from saml_kernels.errors import SAMLError

__all__ = ["Call", "Operator", "learning"]

NO_SECOND_ORDER = "saml_linear: second derivatives are not supported; detach the gradient"


def learning(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors needs gradients."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


class Call(Protocol):
    """A checked call, but for its tensors."""

    def forward(
        self, x: Tensor, lora_a: Tensor, lora_b: Tensor, gates: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """y [..., N], and what `backward` wants kept: first x as it was computed with."""
        ...

    def backward(
        self,
        dy: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        gates: Tensor,
        kept: tuple[Tensor | None, ...],
        needs: tuple[bool, bool, bool, bool],
    ) -> Gradients:
        """Gradients in the shapes and dtypes of x, lora_a, lora_b and gates; None: not needed."""
        ...


class Operator(torch.autograd.Function):
    """y of a call, with its gradients. `gates` is a router's weight where the call has a router."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        gates: Tensor,
        bias: Tensor | None,
        call: Call,
    ) -> Tensor:
        """Run the call and keep what its gradients need: y [..., N]."""
        y, kept = call.forward(x, lora_a, lora_b, gates, bias)
        ctx.save_for_backward(lora_a, lora_b, gates, *kept)
        ctx.call, ctx.bias_dtype = call, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, lora_a, lora_b, gates, bias."""
        lora_a, lora_b, gates, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients: tuple[Tensor | None, ...] = (None,) * 4
        if any(needs[:4]):
            gradients = ctx.call.backward(dy, lora_a, lora_b, gates, tuple(kept), needs[:4])
        dbias = None
        if needs[4]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        if torch.is_grad_enabled():  # create_graph: right once, refused when asked again
            gradients = tuple(g if g is None else _Once.apply(g, dy, *kept) for g in gradients)
        return *gradients, dbias, None


class _Once(torch.autograd.Function):
    """A first derivative as it is; its own derivative is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise SAMLError(NO_SECOND_ORDER)
