"""Experts as they are stored: int8 with scales, float16 or float32."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from saml_kernels import quantize
from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["EXPERT_BLOCK", "int8_expert", "pack_experts", "tensors_hash", "unpack_expert"]

EXPERT_BLOCK = 128

# Parts of an int8 tensor in a file: `<name>` + suffix.
_CODES, _SCALES = ".int8", ".scale"


def pack_experts(
    parameters: dict[str, nn.Parameter] | dict[str, Tensor], expert_format: str
) -> dict[str, Tensor]:
    """Experts and routers as they are stored: float16, or int8 with one scale in 128 elements."""
    packed: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        value = parameter.detach().float().cpu()
        if not torch.isfinite(value).all():
            raise SAMLError(f"{name}: holds NaN or infinity; training diverged, lower the rate")
        if expert_format == "float16":
            packed[name] = value.to(torch.float16)
            continue
        quantised = quantize(value, "int8", EXPERT_BLOCK, double_quant=False)
        packed[name + _CODES] = quantised.codes
        packed[name + _SCALES] = quantised.absmax
    return packed


def unpack_expert(stored: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """One expert tensor from its stored form, float32.

    Raises:
        SAMLError: it is missing, holds NaN or infinity, or its size or dtype is not what `shape`
            asks for.
    """
    value = stored.get(name)
    if value is not None:
        if value.dtype != torch.float16 or value.shape != shape:
            raise SAMLError(
                f"{name}: {value.dtype} {tuple(value.shape)} in the file; expected float16 "
                f"{tuple(shape)}: made for another model or configuration"
            )
        expert = value.float()
    else:
        expert = int8_expert(stored, name, shape).dequantize()
    if not torch.isfinite(expert).all():
        raise SAMLError(f"{name}: holds NaN or infinity; the file is damaged")
    return expert


def int8_expert(stored: dict[str, Tensor], name: str, shape: torch.Size) -> QuantizedTensor:
    """One expert tensor that is stored in int8, as it is; its scales may still be NaN.

    Raises:
        SAMLError: as `unpack_expert`.
    """
    codes, scales = stored.get(name + _CODES), stored.get(name + _SCALES)
    if codes is None or scales is None:
        raise SAMLError(f"{name}: missing from the file: made for another model or configuration")
    blocks = -(-shape.numel() // EXPERT_BLOCK)
    fits = codes.dtype == torch.int8 and scales.dtype == torch.float32
    if not fits or codes.shape != (shape.numel(),) or scales.shape != (blocks,):
        raise SAMLError(
            f"{name}: {codes.dtype} {tuple(codes.shape)} and {scales.dtype} {tuple(scales.shape)} "
            f"in the file; expected {shape.numel()} int8 codes and {blocks} float32 scales: made "
            "for another model or configuration"
        )
    return QuantizedTensor.from_parts(codes, scales, None, None, shape, "int8", EXPERT_BLOCK)


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
