"""The checks of what `saml_linear` is called with."""

from __future__ import annotations

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.quant import QuantizedTensor

__all__ = ["check"]


def check(
    x: Tensor,
    weight: QuantizedTensor,
    lora_a: Tensor | QuantizedTensor,
    lora_b: Tensor | QuantizedTensor,
    gates: Tensor,
    bias: Tensor | None,
    speakers: Tensor | None,
) -> None:
    """Refuse shapes, dtypes and devices that do not fit; see `ops.saml_linear` for the arguments.

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
    if gates.dim() == 0 or gates.shape[-1] != experts or not _broadcasts(gates.shape[:-1], lead):
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
    tensors = {"lora_a": lora_a, "lora_b": lora_b, "gates": gates, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if isinstance(tensor, QuantizedTensor):
            if tensor.format != "int8" or tensor.nested_absmax is not None:
                raise SAMLError(f"{name}: {tensor.format}; expected int8, double_quant=False")
        elif tensor.dtype != x.dtype:
            raise SAMLError(f"{name}: dtype {tensor.dtype}; expected that of x, {x.dtype}")
        if tensor.device != x.device:
            raise SAMLError(f"{name}: on {tensor.device}; expected that of x, {x.device}")
    if weight.codes.device != x.device:
        raise SAMLError(f"weight: on {weight.codes.device}; expected that of x, {x.device}")


def _broadcasts(given: torch.Size, lead: torch.Size) -> bool:
    pairs = zip(reversed(given), reversed(lead), strict=False)
    return len(given) <= len(lead) and all(g in (1, n) for g, n in pairs)
