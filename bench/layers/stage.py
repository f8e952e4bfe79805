"""Inputs of one case, and the truth about what its contenders give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.layers.cases import Case
from bench.layers.checks import poisoned_error
from bench.layers.contenders import Contender, Layer, Operands, nf4, speaker_index
from bench.layers.roofline import Cost, linear_cost
from saml_kernels.backends.reference import gates_from_logits, saml_linear_reference
from saml_kernels.backends.registry import choose_backend

__all__ = ["Stage", "Step"]

# Relative to the norm. INT4 peers are held to the float weight that their codes stand for.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
WEIGHTS = 1 << 29  # bytes that the weights of a train may take in float32
Step = Callable[[], list[Tensor]]


class Stage:
    """Inputs of one case and the truth about them."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype` is what a case runs in that names none."""
        self.case, self.device = case, device
        self.dtype = getattr(torch, case.dtype) if case.dtype else dtype
        self.operands = [
            Operands.random(case, self.device, self.dtype, seed) for seed in range(self._copies())
        ]
        generator = torch.Generator(self.device).manual_seed(99)

        def normal(*shape: int) -> Tensor:
            made = torch.randn(*shape, generator=generator, device=self.device)
            return made.to(self.dtype)

        train, m, k, e = case.mode == "train", case.m, case.k, case.experts
        copies = range(len(self.operands))
        self.x = [normal(m, k).requires_grad_(train) for _ in copies]
        self.gates = [normal(m, e).softmax(-1).detach().requires_grad_(train) for _ in copies]
        self.dy = normal(m, case.n)
        self.first, self.second = self.x[-1].detach().clone(), normal(m, k)
        self.known: dict[Any, list[Tensor]] = {}

    def _copies(self) -> int:
        """Layers in a train: as many as make it long against a clock's tick and a launch."""
        most = max(1, WEIGHTS // (4 * self.case.n * self.case.k))
        if self.case.mode == "train" or self.case.m > 256:
            return 1
        if self.device.type == "cpu":
            return min(most, 4)
        return min(most, 8 if self.case.speakers > 1 else 16)

    def forget(self, i: int, layer: Layer) -> None:
        """Drop the gradients of a training step."""
        for tensor in (self.x[i], self.gates[i], *layer.trainable):
            tensor.grad = None

    def step(self, i: int, layer: Layer, gated: bool) -> list[Tensor]:
        """One call on the i-th input: y; with training, the gradients of x and gates as well.

        In place of the gates' gradient stands the router's, where that makes them.
        """
        x, gates = self.x[i], self.gates[i]
        if self.case.mode != "train":
            return [layer.call(x, gates)]
        self.forget(i, layer)
        with torch.autocast(self.device.type, self.dtype, enabled=self.case.autocast):
            y = layer.call(x, gates)
        y.backward(self.dy)
        chosen = gates if layer.router is None else layer.router
        found = [y.detach(), x.grad, *([chosen.grad] if gated else [])]
        return [t for t in found if t is not None]

    def error(self, contender: Contender, train: Sequence[Step], layer: Layer) -> float:
        """Relative error of the last layer on input that it has not seen."""
        x = self.x[-1]

        def set_x(value: Tensor) -> None:
            with torch.no_grad():
                x.copy_(value)

        def run() -> list[Tensor]:
            return [step() for step in train][-1]

        set_x(self.first)
        found = poisoned_error(
            run, partial(set_x, self.second), lambda: self.truth(contender, layer)
        )
        missing = [t for t in layer.trainable if self.case.mode == "train" and t.grad is None]
        return float("inf") if missing else found

    def truth(self, contender: Contender, layer: Layer) -> list[Tensor]:
        """What the contender should give for the input as it is now, in float64."""
        key = (contender.weight, contender.experts, contender.speakers)
        if layer.weight is not None:
            return self._compute(contender, layer.weight)
        if key not in self.known:
            o = self.operands[-1]
            weight = o.cast(o.weight)[0] if contender.weight == "dense" else nf4(o).dequantize()
            self.known[key] = self._compute(contender, weight.double())
        return self.known[key]

    def _compute(self, contender: Contender, weight: Tensor) -> list[Tensor]:
        o, train = self.operands[-1], self.case.mode == "train"
        bias, a, b, router = (t.double() for t in o.cast(o.bias, o.lora_a, o.lora_b, o.router))
        x = self.x[-1].detach().double().requires_grad_(train)
        gates = self.gates[-1].detach().double()
        if contender.experts == "one":
            gates = torch.ones_like(gates)
        routed = self.case.router == "token" and contender.experts == "gated"
        chosen = router if routed else gates
        chosen.requires_grad_(train and contender.experts == "gated")
        if contender.experts == "none":
            a, b = a[:, :0], b[:, :0]
            gates = gates[:, :0]
        count = contender.speakers or 1
        index = speaker_index(self.case, count, self.device)
        y = x.new_empty(self.case.m, self.case.n)
        with torch.enable_grad() if train else nullcontext():
            if routed:
                gates = gates_from_logits(x @ router.T)
            if count == 1:
                y = saml_linear_reference(x, weight, a[0], b[0], gates, bias)
            for s in range(count if count > 1 else 0):
                rows = index == s
                y[rows] = saml_linear_reference(x[rows], weight, a[s], b[s], gates[rows], bias)
        if not train:
            return [y]
        y.backward(self.dy.double())
        grads = [t.grad for t in (x, chosen) if t.grad is not None]
        return [y.detach(), *grads]

    def tolerance(self, contender: Contender) -> float:
        """How far a result may be off."""
        return TOLERANCE[torch.bfloat16 if contender.weight == "int4" else self.dtype]

    def cost(self, contender: Contender) -> Cost:
        """Bytes and arithmetic of what this contender computes."""
        case, item = self.case, self.dtype.itemsize
        experts = 0 if contender.experts == "none" else case.experts
        read = min(contender.speakers or 1, -(-case.m // case.clip))
        return linear_cost(
            case.m, case.n, case.k, weight_bytes=contender.weight_bytes(case, item),
            item_bytes=item, experts=experts, rank=case.rank, speakers=read,
            train=case.mode == "train",
        )  # fmt: skip

    def backend(self, contender: Contender) -> str | None:
        """Which of this package's backends ran."""
        if not contender.name.startswith("saml"):
            return None
        return choose_backend(self.x[-1], nf4(self.operands[-1]))
