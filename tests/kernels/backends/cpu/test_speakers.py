"""Rows of many speakers in the native kernels, against the equation row by row in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from saml_kernels import SAMLError, quantize, saml_linear, saml_linear_routed
from saml_kernels.backends.cpu import native
from saml_kernels.quantization.tensor import QuantizedTensor

pytestmark = pytest.mark.usefixtures("poisoned")
levels = pytest.mark.parametrize("way", native.LEVELS, indirect=True)
SCALING, TEMPERATURE = 0.75, 1.3
Experts = Tensor | QuantizedTensor


@dataclass
class Batch:
    """x [M, K], experts [S, E, ...] in float32, gates [M, E], router [S, E, K], index [M]."""

    x: Tensor
    weight: QuantizedTensor
    lora_a: Tensor
    lora_b: Tensor
    gates: Tensor
    router: Tensor
    bias: Tensor
    index: Tensor

    def call(
        self, a: Experts, b: Experts, top_k: int | None, index: Tensor | None = None
    ) -> Tensor:
        """The operator; with a top_k by the routers."""
        index = self.index if index is None else index
        with torch.no_grad():
            if top_k is None:
                given = (self.gates, self.bias, SCALING)
                return saml_linear(self.x, self.weight, a, b, *given, speakers=index)
            return saml_linear_routed(
                self.x, self.weight, a, b, self.router, self.bias, SCALING, top_k, TEMPERATURE,
                speakers=index,
            )  # fmt: skip

    def truth(self, a: Tensor, b: Tensor, top_k: int | None) -> Tensor:
        x, a, b, router = (t.double() for t in (self.x, a, b, self.router))
        index, gates = self.index.long(), self.gates.double()
        if top_k is not None:
            logits = torch.einsum("mk,mek->me", x, router[index]) / TEMPERATURE
            kept = logits.topk(top_k, dim=-1).indices
            gates = torch.full_like(logits, -torch.inf).scatter(1, kept, logits.gather(1, kept))
            gates = gates.softmax(-1)
        hidden = torch.einsum("mk,merk->mer", x, a[index]) * gates.unsqueeze(-1)
        y = x @ self.weight.dequantize(torch.float64).T + self.bias.double()
        return y + SCALING * torch.einsum("mer,menr->mn", hidden, b[index])


def batch(index: Tensor, n: int, k: int, speakers: int, experts: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(n + k + len(index))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    m = len(index)
    gates = torch.rand(m, experts, generator=generator)
    gates[:, 0] = 0  # closed
    return Batch(
        random(m, k), quantize(random(n, k) / k**0.5), random(speakers, experts, rank, k) / k**0.5,
        random(speakers, experts, n, rank), gates, random(speakers, experts, k), random(n), index,
    )  # fmt: skip


def stored(experts: Tensor) -> QuantizedTensor:
    return quantize(experts, "int8", 128, double_quant=False)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.isfinite().all()
    error = (found - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < 2e-6, float(error)


INDICES = {
    "unordered": torch.randint(0, 5, (21,), generator=torch.Generator().manual_seed(1)),
    "one row each": torch.arange(5).flip(0),
    "long runs": torch.tensor([1] * 50 + [4] * 37 + [1] * 13),
    "one of many": torch.full((9,), 3),
    "one row": torch.tensor([2]),
    "none": torch.empty(0, dtype=torch.int64),
}


@levels
@pytest.mark.parametrize("layout", ["int8", "side by side", "expert by expert"])
@pytest.mark.parametrize("which", INDICES)
def test_each_row_by_its_own_speaker(way, which, layout):
    made = batch(INDICES[which], 96, 256, 5, 4, 4)
    a: Experts = made.lora_a
    b: Experts = made.lora_b
    if layout == "int8":
        a, b = stored(a), stored(b)
        wide = a.dequantize(), b.dequantize()
    else:
        wide = a, b
        if layout == "side by side":  # as a model holds many
            b = b.transpose(1, 2).contiguous().transpose(1, 2)
    for top_k in (None, 4, 2):
        expected, y = made.truth(*wide, top_k), []
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                y.append(made.call(a, b, top_k))
            finally:
                torch.set_num_threads(before)
        assert y[0].shape == expected.shape
        if len(made.x):
            close(y[0], expected)
        described = made.weight.native
        if native.serves(made.weight) and len(made.x):
            assert described is not None and described.many
            assert torch.equal(*y)  # whatever the number of threads
            assert torch.equal(made.call(a, b, top_k, made.index.to(torch.int32)), y[0])
            assert made.weight.native is described


@levels
@pytest.mark.parametrize(
    ("n", "k", "experts", "rank", "served"),
    [
        (64, 128, 2, 1, True), (128, 128, 3, 2, True), (64, 384, 2, 8, True),
        (64, 128, 2, 16, True), (32, 128, 1, 64, True), (64, 1536, 4, 4, True),
        (64, 128, 4, 3, False), (30, 128, 4, 4, False), (64, 192, 4, 4, False),
    ],
)  # fmt: skip
def test_odd_shapes(way, n, k, experts, rank, served):
    """Those that C does not serve take the way that knows all."""
    made = batch(INDICES["unordered"], n, k, 5, experts, rank)
    a, b = stored(made.lora_a), stored(made.lora_b)
    for top_k in (None, 1):
        close(made.call(a, b, top_k), made.truth(a.dequantize(), b.dequantize(), top_k))
        close(
            made.call(made.lora_a, made.lora_b, top_k), made.truth(made.lora_a, made.lora_b, top_k)
        )
    assert (native.serves_speakers(a, b) is not None) == served


@levels
def test_an_index_for_each_clip_and_gates_that_broadcast(way):
    made = batch(torch.tensor([1, 0, 3, 3]), 64, 128, 5, 4, 4)
    a, b = stored(made.lora_a), stored(made.lora_b)
    rows = made.index.repeat_interleave(6)
    each = replace(
        made, x=torch.randn(24, 128), gates=made.gates.repeat_interleave(6, 0), index=rows
    )
    expected = each.truth(a.dequantize(), b.dequantize(), None).view(4, 6, 64)
    clips = replace(made, x=each.x.view(4, 6, 128), gates=made.gates.unsqueeze(1))
    close(clips.call(a, b, None, made.index.unsqueeze(1)), expected)
    close(clips.call(a, b, None, rows.view(4, 6)), expected)


@levels
def test_one_speaker_in_int8(way):
    made = batch(torch.zeros(7, dtype=torch.int64), 64, 128, 1, 4, 4)
    a, b = stored(made.lora_a[0]), stored(made.lora_b[0])
    with torch.no_grad():
        y = saml_linear(made.x, made.weight, a, b, made.gates, made.bias, SCALING)
    close(y, made.truth(a.dequantize()[None], b.dequantize()[None], None))


@levels
def test_what_does_not_fit_is_said(way):
    made = batch(torch.tensor([0, 5, 1]), 64, 128, 5, 4, 4)
    a, b = stored(made.lora_a), stored(made.lora_b)
    for wrong in (torch.tensor([0, 5, 1]), torch.tensor([-1, 0, 0])):
        with pytest.raises(SAMLError, match=r"holds (5|-1); expected 0\.\.4"):
            made.call(a, b, None, wrong)
    with pytest.raises(SAMLError, match="speakers: shape"):
        made.call(a, b, None, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(SAMLError, match="speakers: dtype"):
        made.call(a, b, None, torch.zeros(3))
    with torch.no_grad(), pytest.raises(SAMLError, match="lora_a"):
        saml_linear(made.x, made.weight, a, b, made.gates, made.bias)


@levels
def test_other_experts_under_the_same_name_are_noticed(way):
    made = batch(torch.tensor([0, 2, 1]), 64, 128, 3, 4, 4)
    a, b = stored(made.lora_a), stored(made.lora_b)
    first = made.call(a, b, None)
    a.absmax = a.absmax * 2
    close(made.call(a, b, None), made.truth(a.dequantize(), b.dequantize(), None))
    assert not torch.equal(made.call(a, b, None), first)
