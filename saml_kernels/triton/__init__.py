"""The seam for the Triton backend: says whether it can run here, and refuses what it cannot.

No kernels are in this release, so `why_unavailable` always gives a reason, `available_backends`
never lists "triton", and CUDA tensors go to the reference.
"""

from __future__ import annotations

from torch import Tensor

from saml_kernels.quant import QuantizedTensor

__all__ = ["unsupported", "why_unavailable"]


def why_unavailable() -> str | None:
    """Why no Triton kernel can run on this machine."""
    return "this release holds no Triton kernels yet"


def unsupported(x: Tensor, weight: QuantizedTensor) -> str | None:
    """Why these arguments cannot run."""
    return why_unavailable()
