"""Fused operators and layers: a frozen low-bit weight plus a gated mixture of LoRA experts."""

from saml_kernels.backends.registry import available_backends
from saml_kernels.config import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.layers.embedding import SAMLEmbedding
from saml_kernels.layers.linear import SAMLLinear
from saml_kernels.ops.api import saml_linear, saml_linear_routed
from saml_kernels.quantization.tensor import QuantizedTensor, quantize

__all__ = [
    "QuantizedTensor",
    "SAMLConfig",
    "SAMLEmbedding",
    "SAMLError",
    "SAMLLinear",
    "available_backends",
    "quantize",
    "saml_linear",
    "saml_linear_routed",
]

__version__ = "0.1.0"
