"""Where a model is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from saml_kernels.errors import SAMLError

__all__ = ["mixed_precision", "on_device"]


def on_device(model: Any, device: str | torch.device | None) -> Any:
    """The model, moved; None is the CPU.

    Raises:
        SAMLError: the device is not there.
    """
    try:
        return nn.Module.to(model, device or "cpu")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SAMLError(f"device {device}: cannot be used: {reason}") from error


def mixed_precision(device: torch.device) -> str:
    """The accelerate name of the fastest safe precision: "bf16", "fp16" or "no"."""
    if device.type == "cuda":
        # Cards before Ampere emulate it, slowly.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return "bf16"
    return "no"
