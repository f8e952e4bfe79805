"""What runs a case: this package, the dense layer, and the equation compiled by PyTorch.

A contender builds a `Layer` from `Operands`; those of other packages are in peers.py.
Gates are given to each [M, E] and no router is timed for anyone, unless the case has a token
router: then each makes its own, softmax(x V^T).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.layers.cases import Case
from saml_kernels import QuantizedTensor, SAMLConfig, SAMLLinear, quantize, saml_linear
from saml_kernels.backends.reference import saml_linear_reference

__all__ = [
    "Contender", "Layer", "Operands", "nf4", "one_lora", "own_contenders", "softmax_gates",
    "speaker_index",
]  # fmt: skip

NF4_BYTES = 0.5 + 1 / 64 + 4 / 64 / 256  # codes, 8-bit scales, their own scales: a weight


@dataclass
class Operands:
    """The numbers of one layer in float32, and what it runs in."""

    case: Case
    device: torch.device
    dtype: torch.dtype
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor
    router: Tensor

    @classmethod
    def random(
        cls, case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> Operands:
        """Weights of the size that keeps y near 1; experts [S, E, r, K] and [S, E, N, r].

        The router is [E, K].
        """
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            made = torch.randn(*shape, generator=generator, device=device)
            return made / shape[-1] ** 0.5

        s, e, r = case.speakers, case.experts, case.rank
        weight, bias = normal(case.n, case.k), normal(case.n)
        lora_a, lora_b = normal(s, e, r, case.k), normal(s, e, case.n, r)
        router = normal(e, case.k)
        return cls(case, device, dtype, weight, bias, lora_a, lora_b, router)

    def cast(self, *tensors: Tensor) -> list[Tensor]:
        """Copies in the dtype that the layer runs in."""
        return [t.to(self.dtype, copy=True) for t in tensors]

    def trainable(self, *tensors: Tensor) -> list[Tensor]:
        """Copies as they are trained: leaves that want a gradient where the case trains."""
        train = self.case.mode == "train"
        return [t.to(self.trained, copy=True).requires_grad_(train) for t in tensors]

    @property
    def trained(self) -> torch.dtype:
        """Of what is trained."""
        return torch.float32 if self.case.autocast else self.dtype

    def own_router(self) -> Tensor | None:
        """A layer's own router [E, K] as it is trained; None where gates are given."""
        return self.trainable(self.router)[0] if self.case.router == "token" else None


@dataclass
class Layer:
    """A layer ready to run.

    Attributes:
        call: (x [M, K], gates [M, E]) -> y [M, N]; with a router of its own it ignores the gates.
        trainable: what must have a gradient after a training step, beside x and the gates; the
            router joins it.
        weight: the float weight [N, K] that it stands for, where that is its own.
        router: the parameter [E, K] that makes its gates, where the case has one.
    """

    call: Callable[[Tensor, Tensor], Tensor]
    trainable: list[Tensor] = field(default_factory=list)
    weight: Tensor | None = None
    router: Tensor | None = None

    def __post_init__(self) -> None:
        if self.router is not None:
            self.trainable = [*self.trainable, self.router]


Build = Callable[[Operands], Layer]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: unique; what tables call it.
        build: makes its layer.
        weight: "dense", "nf4" or "int4": how it stores the base.
        experts: "none"; "gated": E of rank r under gates; "one": one LoRA of rank E r, no gates.
        speakers: how many sets of experts it chooses from by row; None is the plain operator.
        package: the distribution that it comes from, if another's.
        modes: that it can run.
        why_not: why it cannot run a case on a device, or None; asked before `build`.
        slow_build: minutes to build a layer: a short run gives it one case of each work.
    """

    name: str
    build: Build
    weight: str = "dense"
    experts: str = "none"
    speakers: int | None = None
    package: str | None = None
    modes: tuple[str, ...] = ("eager", "graph", "train")
    why_not: Callable[[torch.device], str | None] = lambda device: None
    slow_build: bool = False

    def weight_bytes(self, case: Case, item_bytes: int) -> float:
        """Of the base as this contender stores it."""
        each = {"dense": float(item_bytes), "nf4": NF4_BYTES, "int4": 0.5 + 4 / 64}[self.weight]
        return each * case.n * case.k


def nf4(operands: Operands) -> QuantizedTensor:
    """The base in NF4 with double quantisation; bitsandbytes' bytes are the same."""
    return quantize(operands.weight)


def speaker_index(case: Case, speakers: int, device: torch.device) -> Tensor:
    """Whose experts each of the M rows uses: clips belong to the speakers in turn."""
    rows = torch.arange(case.m, device=device, dtype=torch.int32)
    return rows.div(case.clip, rounding_mode="floor").remainder(speakers).to(torch.int32)


def _dense(o: Operands) -> Layer:
    weight, bias = o.cast(o.weight, o.bias)
    return Layer(lambda x, gates: F.linear(x, weight, bias))


def _saml_base(o: Operands) -> Layer:
    weight, (bias,) = nf4(o), o.cast(o.bias)
    a, b = o.cast(o.lora_a[0, :0], o.lora_b[0, :0])
    return Layer(lambda x, gates: saml_linear(x, weight, a, b, gates[:, :0], bias))


def softmax_gates(x: Tensor, router: Tensor) -> Tensor:
    """A token router in plain PyTorch, as a user would write it: [M, K], [E, K] -> [M, E]."""
    return F.linear(x, router).softmax(-1).to(x.dtype)


def saml_layer(o: Operands) -> Layer:
    """As it is in a model, with a token router of its own."""
    case, train = o.case, o.case.mode == "train"
    config = SAMLConfig(case.experts, case.rank, alpha=float(case.rank))  # s = 1
    bias, *learnt = o.trainable(o.bias, o.lora_a[0], o.lora_b[0], o.router)
    layer: Any = SAMLLinear(nf4(o), bias, config)
    a, b, router = (nn.Parameter(t, train) for t in learnt)
    layer.lora_a, layer.lora_b, layer.router.weight = a, b, router
    return Layer(lambda x, gates: layer(x), [a, b], router=router)


def _saml(o: Operands) -> Layer:
    if o.case.router == "token":
        return saml_layer(o)
    weight, (bias,) = nf4(o), o.cast(o.bias)
    a, b = o.trainable(o.lora_a[0], o.lora_b[0])
    return Layer(lambda x, gates: saml_linear(x, weight, a, b, gates, bias), [a, b])


def _saml_speakers(count: int) -> Build:
    def build(o: Operands) -> Layer:
        weight, (bias,) = nf4(o), o.cast(o.bias)
        a, b = o.cast(o.lora_a[:count], o.lora_b[:count])
        if o.device.type == "cpu":  # laid out as a model with many speakers holds them
            b = b.transpose(1, 2).contiguous().transpose(1, 2)
        index = speaker_index(o.case, count, o.device)

        def call(x: Tensor, gates: Tensor) -> Tensor:
            return saml_linear(x, weight, a, b, gates, bias, speakers=index)

        return Layer(call)

    return build


def _equation(
    x: Tensor, weight: QuantizedTensor, a: Tensor, b: Tensor, gates: Tensor, bias: Tensor,
    routed: bool,
) -> Tensor:  # fmt: skip
    if routed:
        gates = softmax_gates(x, gates)
    return saml_linear_reference(x, weight.dequantize(x.dtype), a, b, gates, bias)


def _compiled(o: Operands) -> Layer:
    """The equation in plain PyTorch, dequantisation included, under torch.compile."""
    weight, (bias,), router = nf4(o), o.cast(o.bias), o.own_router()
    a, b = o.trainable(o.lora_a[0], o.lora_b[0])
    weight.dequantize()  # puts the code tables on the device, before a graph is captured
    torch.compiler.reset()  # one shape at a time: nothing is generalised or given up on
    run = torch.compile(_equation)

    def call(x: Tensor, gates: Tensor) -> Tensor:
        how = gates if router is None else router
        return run(x, weight, a, b, how, bias, router is not None)

    return Layer(call, [a, b], router=router)


def one_lora(o: Operands) -> tuple[Tensor, Tensor]:
    """The first speaker's experts as one LoRA of rank E r: [R, K] and [N, R]."""
    return o.lora_a[0].flatten(0, 1), o.lora_b[0].permute(1, 0, 2).flatten(1)


def own_contenders() -> list[Contender]:
    """Those that need nothing but this package."""
    found = [
        Contender("dense", _dense),
        Contender("saml base", _saml_base, "nf4"),
        Contender("saml + experts", _saml, "nf4", "gated"),
        Contender("torch.compile of the reference", _compiled, "nf4", "gated", slow_build=True),
    ]
    for count in (1, 8, 64):
        name = f"saml, {count} speaker{'s' * (count > 1)}"
        build = _saml_speakers(count)
        found.append(Contender(name, build, "nf4", "gated", count, modes=("eager", "graph")))
    return found
