"""The backends by name, and which of them runs a call."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from saml_kernels.backends import reference
from saml_kernels.backends.cpu import backend as cpu
from saml_kernels.backends.reference import Gradients
from saml_kernels.backends.triton import backend as triton
from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = [
    "BACKENDS",
    "PREFERRED",
    "Backend",
    "available_backends",
    "choose_backend",
    "why_unavailable",
]


class Backend(Protocol):
    """What a backend's module offers; `reference.py` says what each gives."""

    def why_unavailable(self) -> str | None:
        """Why it cannot run on this machine, in a few words; None if it can."""

    def unsupported(self, x: Tensor, weight: QuantizedTensor) -> str | None:
        """Why it cannot run a call with these, in a few words; None if it can."""

    def forward(
        self,
        x: Tensor,
        weight: QuantizedTensor,
        lora_a: Tensor,
        lora_b: Tensor,
        gates: Tensor,
        bias: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """The operator."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: QuantizedTensor,
        lora_a: Tensor,
        lora_b: Tensor,
        gates: Tensor,
        scaling: float,
        needs: tuple[bool, bool, bool, bool],
    ) -> Gradients:
        """Gradients of x, lora_a, lora_b and gates: those that `needs` asks for."""


BACKENDS: dict[str, Backend] = {"reference": reference, "cpu": cpu, "triton": triton}
# Which backend a device's tensors go to first; what it cannot run goes to the reference.
PREFERRED = {"cpu": "cpu", "cuda": "triton"}


def why_unavailable(name: str) -> str | None:
    """Why backend `name` cannot run on this machine, or None if it can."""
    return BACKENDS[name].why_unavailable()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that run on this machine, the specification first.

    Example:
        >>> "reference" in available_backends()
        True
    """
    return tuple(name for name in BACKENDS if why_unavailable(name) is None)


def choose_backend(x: Tensor, weight: QuantizedTensor, backend: str | None = None) -> str:
    """Name of the backend that will run this call.

    Raises:
        SAMLError: `backend` is unknown, not available here, or cannot run these arguments.
    """
    if backend is None:
        name = PREFERRED.get(x.device.type, "reference")
        usable = why_unavailable(name) is None and BACKENDS[name].unsupported(x, weight) is None
        return name if usable else "reference"
    if backend not in BACKENDS:
        raise SAMLError(f"backend: {backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    reason = why_unavailable(backend) or BACKENDS[backend].unsupported(x, weight)
    if reason:
        raise SAMLError(f"backend: {backend!r} cannot run this call: {reason}")
    return backend
