"""Where a model is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from saml_kernels.errors import SAMLError

__all__ = ["on_device"]


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
