"""What the launches of a call depend on, and what kernels are told of a quantised weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saml_kernels.backends.reference import Gating
from saml_kernels.backends.triton.configs import (
    SHARED_OUT,
    Config,
    bounded,
    choose,
    from_hopper,
)
from saml_kernels.backends.triton.kernels.lookup import lookup_ptx
from saml_kernels.backends.triton.launcher import interpreting
from saml_kernels.backends.triton.signature import ALIGNMENT
from saml_kernels.quantization.codes import code_table
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = [
    "CUBLAS_COLUMNS",
    "DENSE",
    "Facts",
    "Strides",
    "WeightParts",
    "decoding_facts",
    "power_of_2",
    "tiles",
    "weight_parts",
]

BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8}
CUBLAS_COLUMNS = 8  # widened operands are padded to this: else cuBLAS leaves its aligned kernels
DESCRIBED_COLUMNS = 64  # of experts, at most, that a persistent product has shared memory for
A_KIND = 3  # where `Facts.kinds` has lora_a, after the parts of the weight

Strides = tuple[int, int, int, int]  # of speaker, expert, direction within the expert, feature
WeightParts = tuple[Tensor | None, ...]


class Facts(NamedTuple):
    """What a call's launches depend on.

    Attributes:
        m, n, k: rows, out-features, in-features.
        dtype: of x and of the result.
        format, block_size: of the weight.
        experts, rank: E, r; either may be 0.
        speakers: S, or 0 where there is no speaker index.
        a_strides, b_strides: of lora_a and lora_b, in elements.
        a_block, b_block: of int8 experts, elements that share a scale; 0 for others.
        gating: of a token router, or None where gates are given.
        gates_span, speakers_span: rows that share a row of gates, or an entry of the index.
        bias: whether there is one.
        precision: of float32 products; see `dispatch.precision`.
        device, traits: see `configs.device_traits`.
        kinds: dtypes and alignments of the tensors given, which kernels are specialised on.
        route: overrides the tuning tables.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    format: str
    block_size: int
    experts: int
    rank: int
    speakers: int
    a_strides: Strides
    b_strides: Strides
    a_block: int
    b_block: int
    gating: Gating | None
    gates_span: int
    speakers_span: int
    bias: bool
    precision: str
    device: torch.device
    traits: tuple[str, int, str]
    kinds: tuple[Any, ...]
    route: str | Config | None = None

    @property
    def columns(self) -> int:
        """R = E r."""
        return self.experts * self.rank

    @property
    def exact(self) -> bool:
        """Whether products are those of float32."""
        return self.dtype == torch.float32

    @property
    def float32_experts(self) -> bool:
        """Whether half-precision tokens meet experts in float32."""
        kind = self.kinds[A_KIND]
        return not self.exact and kind is not None and kind[0] == torch.float32

    def config(self, direction: str) -> Config:
        """Route and tiles of "forward" or "backward"."""
        route = self.route
        if isinstance(route, Config):
            config = route if route.split else bounded(route, direction, self.n, self.k)
        else:
            config = choose(direction, self.m, self.n, self.k, *self.traits)
            if route is not None:
                split = config.split if route in SHARED_OUT else 1
                config = replace(config, route=route, split=split)
        apart = direction == "backward" or not self.columns or torch.version.hip is not None
        if config.route == "stacked" and apart:
            # A backward's is [dY W | dY B], without experts there is nothing to stack, and PyTorch
            # has half-precision products with float32 results for CUDA alone.
            config = replace(config, route="scratch")
        if self.speakers and config.route in ("scratch", "stacked"):
            # [W | B] and [W ; A] have room for one speaker's experts.
            config = replace(config, route="dense", split=1)
        described = config.route == "dense" and direction == "forward" and self.describable
        if config.loads == "descriptors" and not described:
            # Tiles that programs which stay have room for are too large for others.
            block_o, stages = min(config.block_o, 128), min(config.stages, 3)
            config = replace(config, loads="pointers", block_o=block_o, stages=stages)
        return config

    @property
    def describable(self) -> bool:
        """Whether tensor descriptors can read the factors of a dense forward.

        One speaker's, in 16 bits, on a device that has them, with rows of x that begin at multiples
        of 16 bytes; the others are scratch, which is laid out so.
        """
        aligned = self.kinds[-1] and self.k * self.dtype.itemsize % ALIGNMENT == 0
        fits = self.columns <= DESCRIBED_COLUMNS and not self.speakers and not self.exact
        return aligned and fits and from_hopper(self.traits[0])

    def gating_constants(self) -> dict[str, Any]:
        """Compile-time facts of the gates."""
        top_k = self.gating[0] if self.gating else None
        kept = top_k if top_k is not None and top_k < self.experts else 0
        return {"TOP_K": kept, "BLOCK_E": max(16, power_of_2(self.experts))}

    def inverse_temperature(self) -> float:
        """What the router's logits are multiplied by."""
        return 1.0 / self.gating[1] if self.gating else 1.0


def weight_parts(weight: QuantizedTensor) -> WeightParts:
    """What kernels are given of a weight: codes, float32 scales, the table that decodes codes."""
    table = code_table(weight.format, weight.device) if BITS[weight.format] == 4 else None
    return weight.codes, weight.kernel_scales(), table


def decoding_facts(facts: Facts, along: int, after: bool = False) -> dict[str, Any]:
    """Compile-time facts of the quantised weight, for tiles `along` wide along its rows.

    `after` asks for scales after the product, which AFTER grants where blocks and tiles allow it.
    """
    bits = BITS[facts.format]
    whole, wide = facts.block_size % along == 0, along % facts.block_size == 0
    aligned = facts.k % facts.block_size == 0 and (whole or wide)
    after = after and aligned and whole
    # Scaled before, a code in float16 is as good as in bfloat16 and better.
    value = facts.dtype if after or facts.exact else torch.float16
    permutes = bits == 4 and not interpreting() and torch.version.hip is None
    ptx = lookup_ptx(facts.format, str(value).removeprefix("torch.")) if permutes else ""
    return {
        "BITS": bits, "QBLOCK": facts.block_size,
        "ALIGNED": aligned, "AFTER": after, "PTX": ptx,
    }  # fmt: skip


DENSE = {"BITS": 16, "QBLOCK": 0, "ALIGNED": False, "AFTER": False, "PTX": ""}


def tiles(size: int, block: int) -> int:
    """Tiles of `block` that cover `size`."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(0, size - 1).bit_length()
