"""What `saml_linear` is called with: checks, autocast, and what broadcasts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from saml_kernels.backends.reference import Gating
from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["autocast_dtype", "check", "readable", "span"]

# Asked here, because torch 2.11 cannot trace the question. The meta device, for one, has none.
AUTOCAST_DEVICES = frozenset(
    name
    for name in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla")
    if torch.amp.is_autocast_available(name)
)
HALF = (torch.float16, torch.bfloat16)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute with `x` in; None where it is off or leaves `x` alone."""
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None
    device = x.device.type
    if device not in AUTOCAST_DEVICES:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def readable(tensor: Tensor | QuantizedTensor | None, x: Tensor) -> Any:
    """A parameter as `check` takes it beside `x`: as it is, or cast where it has to be."""
    if tensor is None or isinstance(tensor, QuantizedTensor) or tensor.dtype == x.dtype:
        return tensor
    return tensor if x.dtype in HALF and tensor.dtype == torch.float32 else tensor.to(x.dtype)


def span(given: torch.Size, lead: torch.Size) -> int | None:
    """How many rows in a row share an entry: `given` [..] broadcast over the rows `lead` [..].

    None where they do not lie side by side.
    """
    padded = (1,) * (len(lead) - len(given)) + tuple(given)
    end = len(lead)
    while end and padded[end - 1] == 1:
        end -= 1
    return math.prod(lead[end:]) if padded[:end] == tuple(lead[:end]) else None


def check(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor | QuantizedTensor,
    lora_b: Tensor | QuantizedTensor,
    gates: Tensor,
    bias: Tensor | None,
    speakers: Tensor | None,
    gating: Gating | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse shapes, dtypes and devices that do not fit; see `api.saml_linear` for the arguments.

    With `gating`, `gates` is the weight of a token router. `dtype` is what autocast computes in.

    Raises:
        SAMLError: names the argument, what came and what was expected.
    """
    if len(weight.shape) != 2:
        raise SAMLError(f"weight: shape {tuple(weight.shape)}; expected two dimensions [N, K]")
    out_features, in_features = weight.shape
    if not x.is_floating_point():
        raise SAMLError(f"x: dtype {x.dtype}; expected a floating-point tensor")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise SAMLError(f"x: shape {tuple(x.shape)}; expected [..., {in_features}] for this weight")
    many = "" if speakers is None else "S, "
    if len(lora_a.shape) != 3 + bool(many) or lora_a.shape[-1] != in_features:
        wanted = f"[{many}E, r, {in_features}]"
        raise SAMLError(f"lora_a: shape {tuple(lora_a.shape)}; expected {wanted}")
    experts, rank, _ = lora_a.shape[-3:]
    expected = {
        "lora_b": (lora_b, (*lora_a.shape[:-3], experts, out_features, rank)),
        "bias": (bias, (out_features,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise SAMLError(f"{name}: shape {tuple(tensor.shape)}; expected {shape}")
    lead = x.shape[:-1]
    if gating is not None:
        whole = (*lora_a.shape[:-3], experts, in_features)
        if tuple(gates.shape) != whole:
            raise SAMLError(f"router: shape {tuple(gates.shape)}; expected {whole}")
        if gating[0] is not None and not 1 <= gating[0] <= experts:
            raise SAMLError(f"top_k: {gating[0]}; expected 1..{experts} or None")
    elif gates.dim() == 0 or gates.shape[-1] != experts or not _broadcasts(gates.shape[:-1], lead):
        raise SAMLError(
            f"gates: shape {tuple(gates.shape)}; expected {(*lead, experts)} or what broadcasts"
        )
    if speakers is not None:
        if speakers.dtype not in (torch.int32, torch.int64):
            raise SAMLError(f"speakers: dtype {speakers.dtype}; expected int32 or int64")
        if not _broadcasts(speakers.shape, lead):
            given = tuple(speakers.shape)
            raise SAMLError(f"speakers: shape {given}; expected {tuple(lead)} or what broadcasts")
        if speakers.device != x.device:
            raise SAMLError(f"speakers: on {speakers.device}; expected that of x, {x.device}")
    of_gates = "gates" if gating is None else "router"
    tensors = {"lora_a": lora_a, "lora_b": lora_b, of_gates: gates, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if isinstance(tensor, QuantizedTensor):
            if tensor.format != "int8" or tensor.nested_absmax is not None:
                raise SAMLError(f"{name}: {tensor.format}; expected int8, double_quant=False")
        elif dtype is None and readable(tensor, x) is not tensor:
            raise SAMLError(f"{name}: dtype {tensor.dtype}; expected that of x, {x.dtype}")
        if tensor.device != x.device:
            raise SAMLError(f"{name}: on {tensor.device}; expected that of x, {x.device}")
    if weight.codes.device != x.device:
        raise SAMLError(f"weight: on {weight.codes.device}; expected that of x, {x.device}")


def _broadcasts(given: torch.Size, lead: torch.Size) -> bool:
    pairs = zip(reversed(given), reversed(lead), strict=False)
    return len(given) <= len(lead) and all(g in (1, n) for g, n in pairs)
