"""Convolutions: of kernel 1 with experts, others quantised."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels.config import SAMLConfig
from saml_kernels.layers.context import BatchContext
from saml_kernels.layers.linear import SAMLLinear
from saml_kernels.ops.arguments import autocast_dtype
from saml_kernels.quantization.tensor import QuantizedTensor, quantize

__all__ = ["QuantizedConv1d", "QuantizedConv2d", "SAMLPointwiseConv1d"]


class _QuantizedConv(nn.Module):
    """An ordinary convolution with its weight in low bits, dequantised when used."""

    convolve: Any

    def __init__(
        self,
        conv: nn.Conv1d | nn.Conv2d,
        config: SAMLConfig,
        weight: QuantizedTensor | None = None,
    ) -> None:
        """Quantise `conv` (weight [N, K / groups, *kernel]); the original is left alone.

        With `weight`, that stands for the convolution's.

        A block never straddles two filters' rows if K * kernel is a multiple of the block; where
        it is not, blocks run on as in bitsandbytes.
        """
        nn.Module.__init__(self)
        if weight is None:
            source = conv.weight.detach()
            weight = quantize(source, config.format, config.block_size, config.double_quant)
        self.weight: Any = weight
        self.bias: Any = None if conv.bias is None else nn.Parameter(conv.bias.detach(), False)
        self.kernel_size: Any = conv.kernel_size
        self.stride: Any = conv.stride
        self.padding: Any = conv.padding
        self.dilation: Any = conv.dilation
        self.groups = conv.groups
        self.padding_mode = conv.padding_mode
        # Of all sides, the last dimension first, as `F.pad` wants them.
        self.sides: list[int] = conv._reversed_padding_repeated_twice

    def forward(self, x: Tensor) -> Tensor:
        """x [B, K, ...] -> [B, N, ...]."""
        dtype = autocast_dtype(x) or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.weight.dequantize(dtype)
        x, padding = x.to(dtype), self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.sides, self.padding_mode), 0
        return self.convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return (
            f"{tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding}, "
            f"padding_mode={self.padding_mode}, format={self.weight.format}"
        )


class QuantizedConv1d(_QuantizedConv):
    """x [B, K, T] -> [B, N, T']."""

    convolve = staticmethod(F.conv1d)


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """x [B, K, H, W] -> [B, N, H', W'].

    An `nn.Conv2d` by type, because encoders ask for that to know which outputs to mask.
    """

    convolve = staticmethod(F.conv2d)


class SAMLPointwiseConv1d(nn.Module):
    """A convolution of kernel 1 (a linear layer in disguise): x [B, K, T] -> [B, N, T]."""

    def __init__(self, linear: SAMLLinear) -> None:
        super().__init__()
        self.linear = linear

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv1d,
        config: SAMLConfig,
        context: BatchContext | None = None,
        weight: QuantizedTensor | None = None,
    ) -> SAMLPointwiseConv1d:
        """Quantise an `nn.Conv1d` with kernel 1, stride 1, no padding, one group.

        With `weight` [N, K, 1], that stands for the convolution's.
        """
        out_features, in_features, _ = conv.weight.shape
        linear = nn.Linear(in_features, out_features, conv.bias is not None, device="meta")
        linear.weight = nn.Parameter(conv.weight.detach().squeeze(-1), requires_grad=False)
        if conv.bias is not None:
            linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
        return cls(SAMLLinear.from_linear(linear, config, context, weight=weight))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, K, T] -> [B, N, T]."""
        return self.linear(x.transpose(-1, -2)).transpose(-1, -2)
