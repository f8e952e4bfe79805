"""`saml_linear` and `saml_linear_routed`: the public functions."""

from __future__ import annotations

from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.ops.call import run
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["saml_linear", "saml_linear_routed"]


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
        lora_a: [E, r, K] (E = 0 leaves the base alone), in the dtype of `x`, or in float32 where
            `x` is a half-precision type (or autocast makes it one): kept by the optimiser, read as
            they lie. Or both experts frozen in 8 bits: `quantize(lora_a, "int8", 128,
            double_quant=False)`. The Triton kernels read those as they lie where no gradient is
            wanted.
        lora_b: [E, N, r], likewise.
        gates: [..., E], broadcast over the leading dimensions of `x`; differentiable; of the same
            dtypes.
        bias: [N] or None; of the same dtypes.
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

    Example:
        >>> weight = quantize(torch.eye(64))
        >>> lora_a, lora_b = torch.ones(2, 4, 64), torch.zeros(2, 64, 4)
        >>> gates = torch.full((3, 2), 0.5)
        >>> saml_linear(torch.ones(3, 64), weight, lora_a, lora_b, gates).shape
        torch.Size([3, 64])
    """
    return run(x, weight, lora_a, lora_b, gates, bias, scaling, None, backend, speakers)


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
        router: [E, K]; with `speakers` [S, E, K]; differentiable; of the dtypes of lora_a.
        top_k: keep this many gates of a token, renormalised; None keeps all.
        temperature: the logits are divided by it.

    Returns:
        [..., N] in the dtype of `x` (of autocast, where that is on).

    Raises:
        SAMLError: as `saml_linear`; a top_k outside 1..E; a temperature that is not positive.

    Example:
        >>> weight = quantize(torch.eye(64))
        >>> lora_a, lora_b, router = torch.ones(2, 4, 64), torch.zeros(2, 64, 4), torch.zeros(2, 64)
        >>> saml_linear_routed(torch.ones(3, 64), weight, lora_a, lora_b, router).shape
        torch.Size([3, 64])
    """
    if not 0.0 < temperature < float("inf"):
        raise SAMLError(f"temperature: {temperature}; expected a positive number")
    gating = (top_k, temperature)
    return run(x, weight, lora_a, lora_b, router, bias, scaling, gating, backend, speakers)
