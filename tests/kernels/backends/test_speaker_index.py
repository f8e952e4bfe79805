"""Rows of many speakers in one call: each uses its own experts, whatever the order."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from saml_kernels import SAMLError, quantize, saml_linear
from saml_kernels.backends.reference import saml_linear_reference
from saml_kernels.backends.registry import available_backends
from saml_kernels.ops.registration import parts_of

BACKENDS = [b for b in ("reference", "cpu", "triton") if b in available_backends()]
if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    BACKENDS = [b for b in BACKENDS if b != "triton"]  # on a GPU, triton/ has it


def make(m, speakers, dtype=torch.float32, n=24, k=64, experts=2, rank=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g, dtype=dtype)
    a = torch.randn(speakers, experts, rank, k, generator=g, dtype=dtype)
    b = torch.randn(speakers, experts, n, rank, generator=g, dtype=dtype)
    gates = torch.rand(m, experts, generator=g, dtype=dtype)
    index = torch.randint(0, speakers, (m,), generator=g)
    weight = quantize(torch.randn(n, k, generator=g))
    return x, weight, a, b, gates, torch.randn(n, generator=g, dtype=dtype), index


def one_by_one(x, weight, a, b, gates, bias, index):
    dense = weight.dequantize(x.dtype)
    rows = [
        saml_linear_reference(x[i : i + 1], dense, a[s], b[s], gates[i : i + 1], bias, 0.5)
        for i, s in enumerate(index.tolist())
    ]
    return torch.cat(rows) if rows else x.new_empty(0, dense.shape[0])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(m=st.integers(0, 40), speakers=st.integers(1, 9), seed=st.integers(0, 1000))
def test_each_row_its_own(backend, m, speakers, seed):
    x, weight, a, b, gates, bias, index = make(m, speakers, seed=seed)
    y = saml_linear(x, weight, a, b, gates, bias, 0.5, backend, index)
    torch.testing.assert_close(y, one_by_one(x, weight, a, b, gates, bias, index))


@pytest.mark.parametrize("k", [64, 2048])  # experts small enough to be copied by row, or not
@pytest.mark.parametrize("order", ["as they come", "shuffled", "uneven"])
@pytest.mark.parametrize("rows", [5, 80])  # of each speaker: few, or enough for calls of their own
def test_stretches_of_speakers(rows, order, k):
    x, weight, a, b, gates, bias, _ = make(3 * rows + 7, 4, k=k, n=32, rank=4)
    counts = (rows, 0, rows + 7, rows) if order == "uneven" else (rows, 7, rows, rows)
    index = torch.arange(4).repeat_interleave(torch.tensor(counts))
    if order == "shuffled":
        index = index[torch.randperm(len(index))]
    y = saml_linear(x, weight, a, b, gates, bias, 0.5, "cpu", index)
    expected = one_by_one(x, weight, a, b, gates, bias, index)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient(backend):
    x, weight, a, b, gates, bias, index = make(17, 5)
    index[index == 3] = 2  # nobody is speaker 3
    found, expected = ([t.clone().requires_grad_() for t in (x, a, b, gates)] for _ in range(2))
    dy = torch.randn(17, 24)
    y = saml_linear(found[0], weight, *found[1:], bias, 0.5, backend, index)
    y.backward(dy)
    one_by_one(expected[0], weight, *expected[1:], bias, index).backward(dy)
    for t, e in zip(found, expected, strict=True):
        torch.testing.assert_close(t.grad, e.grad, rtol=1e-4, atol=1e-4)
    assert not found[1].grad[3].any()


def test_gradcheck_in_float64():
    x, weight, a, b, gates, bias, index = make(4, 3, torch.float64, n=5, k=6)
    leaves = [t.requires_grad_() for t in (x, a, b, gates)]
    torch.autograd.gradcheck(
        lambda *t: saml_linear(t[0], weight, *t[1:], bias, 0.5, speakers=index), leaves
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, weight, a, b, gates, bias, index = make(6, 3)
    leaves = [t.requires_grad_() for t in (x, a, b, gates)]
    arguments = (
        leaves[0], *parts_of(weight), *leaves[1:], bias, 0.5, backend, index.to(torch.int32)
    )  # fmt: skip
    library.opcheck(torch.ops.saml_kernels.linear.default, arguments)


def test_compiles_whole_and_broadcasts():
    x, weight, a, b, gates, bias, index = make(6, 3)
    batch, own = x.view(2, 3, -1), index[:2, None]

    def run(x):
        return saml_linear(x, weight, a, b, gates.view(2, 3, -1), bias, 0.5, speakers=own)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), run(batch))
    expected = one_by_one(x, weight, a, b, gates, bias, own.expand(2, 3).reshape(-1))
    torch.testing.assert_close(run(batch).view(6, -1), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speakers": torch.zeros(6)}, "speakers: dtype torch.float32; expected int32 or int64"),
        ({"speakers": torch.zeros(5, dtype=torch.int32)}, r"speakers: shape \(5,\); expected"),
        ({"speakers": torch.full((6,), 3)}, r"speakers: holds 3; expected 0\.\.2"),
        ({"speakers": torch.full((6,), -1)}, r"speakers: holds -1; expected 0\.\.2"),
        ({"lora_a": torch.zeros(2, 3, 64)}, r"lora_a: shape \(2, 3, 64\); expected \[S, E, r"),
        ({"lora_b": torch.zeros(4, 2, 24, 3)}, r"lora_b: shape \(4, 2, 24, 3\); expected \(3,"),
        ({"speakers": None}, r"lora_a: shape \(3, 2, 3, 64\); expected \[E, r, 64\]"),
    ],
)
def test_errors_name_the_argument(change, message):
    x, weight, a, b, gates, bias, index = make(6, 3)
    given = {"lora_a": a, "lora_b": b, "speakers": index} | change
    with pytest.raises(SAMLError, match=message):
        saml_linear(
            x, weight, given["lora_a"], given["lora_b"], gates, bias, speakers=given["speakers"]
        )
