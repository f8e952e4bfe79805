"""The CPU backend against the operator's equation written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saml_kernels.backends.cpu import backend as cpu
from saml_kernels.backends.cpu import native
from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import FORMATS, QuantizedTensor, quantize

only_native = pytest.mark.parametrize("way", native.LEVELS, indirect=True)
few = settings(max_examples=20, deadline=None)
Inputs = tuple[Tensor, QuantizedTensor, Tensor, Tensor, Tensor, Tensor]


@cache
def quantized(n: int, k: int, format: str, block: int, double: bool) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(n + 101 * k)
    return quantize(torch.randn(n, k, generator=generator), format, block, double)


def make(
    m: int,
    n: int,
    k: int,
    experts: int,
    rank: int,
    format: str = "nf4",
    block: int = 64,
    double: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    generator = torch.Generator().manual_seed(m + 31 * n + 101 * k + experts)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weight = quantized(n, k, format, block, double)
    gates = torch.rand(m, experts, generator=generator).to(dtype)
    a, b = random(experts, rank, k), random(experts, n, rank)
    return random(m, k), weight, a, b, gates, random(n)


def expected(
    inputs: Inputs, scaling: float, of: Callable[[Tensor], Tensor] = torch.Tensor.clone
) -> tuple[Tensor, list[Tensor]]:
    """The output, and the differentiable float64 leaves (x, lora_a, lora_b, gates) behind it.

    `of` is applied to every operand first: with `torch.abs` the results are what the terms of each
    sum add up to.
    """
    x, weight, a, b, gates, bias = inputs
    leaves = [of(t.detach().double()).requires_grad_() for t in (x, a, b, gates)]
    x, a, b, gates = leaves
    y = x @ of(weight.dequantize(torch.float64)).T + of(bias.double())
    for e in range(a.shape[0]):
        y = y + scaling * (gates[:, e : e + 1] * (x @ a[e].T)) @ b[e].T
    return y, leaves


def largest(tensor: Tensor) -> float:
    """The size of the largest element; 0 where there is none."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_close(
    actual: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32, terms: float = 0.0
) -> None:
    """To a tensor's largest element; where sums cancel, to their largest `terms` as well."""
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    assert actual.shape == wanted.shape and actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(),
        wanted.detach(),
        rtol=0.0,
        atol=tolerance * largest(wanted) + torch.finfo(torch.float32).eps * terms + 1e-12,
    )


def check(inputs: Inputs, scaling: float, dtype: torch.dtype = torch.float32) -> None:
    x, weight, a, b, gates, bias = inputs
    y, leaves = expected(inputs, scaling)
    absolute, sizes = expected(inputs, scaling, torch.abs)
    found_y = cpu.forward(x, weight, a, b, gates, bias, scaling)
    assert_close(found_y, y, dtype, largest(absolute))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = torch.autograd.grad(y, leaves, dy.double(), materialize_grads=True)
    terms = torch.autograd.grad(absolute, sizes, dy.double().abs(), materialize_grads=True)
    found = cpu.backward(dy, x, weight, a, b, gates, scaling, (True, True, True, True))
    for gradient, want, sums in zip(found, wanted, terms, strict=True):
        assert gradient is not None
        assert_close(gradient, want, dtype, largest(sums))


@few
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 40),
    k=st.sampled_from([1, 7, 32, 64, 100, 128, 320]),
    experts=st.integers(0, 4),
    rank=st.integers(1, 20),
    format=st.sampled_from(FORMATS),
    block=st.sampled_from([32, 64, 128]),
    double=st.booleans(),
)
def test_any_shape(
    way: str,
    m: int,
    n: int,
    k: int,
    experts: int,
    rank: int,
    format: str,
    block: int,
    double: bool,
) -> None:
    check(make(m, n, k, experts, rank, format, block, double), 0.75)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [1, 2, 5, 17, 130])
def test_rows_of_whisper(way: str, format: str, m: int) -> None:
    """Widths of tiny.en; 130 rows take more than one slab of x, 70 rows no whole tiles."""
    check(make(m, 70, 1536, 4, 8, format), 2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [0, 3, 40])
def test_half_precision(way: str, dtype: torch.dtype, m: int) -> None:
    check(make(m, 48, 256, 3, 4, dtype=dtype), 1.0, dtype)


@pytest.mark.parametrize("m", [5, 40])
def test_autocast_around_the_call_changes_nothing(way: str, m: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check(make(m, 24, 96, 2, 3), 0.5)


def test_strided_and_broadcast_inputs(way: str) -> None:
    x, weight, a, b, gates, bias = make(6, 24, 128, 2, 4)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    shared = gates[:1].expand(6, 2)
    assert not strided.is_contiguous()
    check((strided, weight, a.transpose(1, 2).contiguous().transpose(1, 2), b, shared, bias), 1.0)


def test_no_bias_and_unwanted_gradients(way: str) -> None:
    inputs = make(4, 24, 128, 2, 4)
    x, weight, a, b, gates, bias = inputs
    with_bias = cpu.forward(x, weight, a, b, gates, bias, 1.0)
    without = cpu.forward(x, weight, a, b, gates, None, 1.0)
    assert_close(without + bias, with_bias.double())
    full = cpu.backward(with_bias, x, weight, a, b, gates, 1.0, (True, True, True, True))
    for wanted in range(4):
        needs = tuple(i == wanted for i in range(4))
        found = cpu.backward(with_bias, x, weight, a, b, gates, 1.0, needs)  # type: ignore[arg-type]
        for i, (gradient, whole) in enumerate(zip(found, full, strict=True)):
            if i == wanted:
                assert gradient is not None and whole is not None and torch.equal(gradient, whole)
            else:
                assert gradient is None


def test_closed_experts_are_not_read(way: str) -> None:
    x, weight, a, b, gates, bias = make(5, 24, 128, 3, 4)
    gates[:, 1] = 0.0
    y, _ = expected((x, weight, a, b, gates, bias), 1.0)
    if native.fits(5, weight):
        a[1], b[1] = float("nan"), float("nan")
    assert_close(cpu.forward(x, weight, a, b, gates, bias, 1.0), y)


@only_native
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("k", "block"), [(100, 64), (101, 32), (256, 64), (640, 128)])
def test_dequantised_bit_for_bit(way: str, format: str, double: bool, k: int, block: int) -> None:
    _, weight, *_ = make(1, 83, k, 0, 1, format, block, double)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((70, k), float("nan"), dtype=dtype)
        native.dequantize(weight, 9, 79, out)
        assert torch.equal(out, weight.dequantize(dtype)[9:79])


def test_threads_do_not_change_the_result(way: str) -> None:
    inputs = make(17, 301, 512, 3, 8)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.forward(*inputs, 1.0))
    finally:
        torch.set_num_threads(before)
    y, _ = expected(inputs, 1.0)
    for result in results:
        assert_close(result, y)


@only_native
@pytest.mark.parametrize("m", [1, 2, 3, 17])
@pytest.mark.parametrize(
    ("experts", "rank", "n"),
    [(0, 1, 301), (4, 4, 301), (3, 7, 301), (10, 1, 320), (4, 4, 368), (4, 16, 320), (2, 64, 301)],
)
def test_threads_do_not_change_a_bit(way: str, m: int, experts: int, rank: int, n: int) -> None:
    """A few rows: whether they share what is prepared or each prepare it, and whose rows of B."""
    inputs = make(m, n, 1024, experts, rank)
    if not native.fits(m, inputs[1]):
        pytest.skip(f"{way} does not multiply {m} rows")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = cpu.forward(*inputs, 1.0)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.forward(*inputs, 1.0), alone)
    finally:
        torch.set_num_threads(before)


@only_native
def test_short_buffers_are_refused(way: str) -> None:
    x, _, a, b, gates, bias = make(2, 64, 128, 0, 1)
    weight = quantize(torch.randn(64, 128))
    weight.codes = weight.codes[:-1]
    with pytest.raises(SAMLError, match="buffers too short"):
        cpu.forward(x, weight, a, b, gates, bias, 1.0)


def test_unsupported_and_status(way: str) -> None:
    x, weight, *_ = make(2, 8, 64, 0, 1)
    assert cpu.unsupported(x, weight) is None
    assert "float64" in (cpu.unsupported(x.double(), weight) or "")
    assert "meta" in (cpu.unsupported(x.to("meta"), weight) or "")
    assert way in cpu.native_status()


def test_weights_stay_dequantised_within_the_block_alone(monkeypatch):
    one, other = quantize(torch.randn(64, 64)), quantize(torch.randn(64, 128))
    made = []
    true = cpu._dequantised
    monkeypatch.setattr(
        cpu, "_dequantised", lambda weight, dtype: made.append(weight) or true(weight, dtype)
    )
    with cpu.keep_dense(64 * 64 * 4):
        for _ in range(2):
            for weight in (one, other):
                assert torch.equal(cpu._dense(weight, torch.float32), weight.dequantize())
        assert [w is one for w in made] == [True, False, False]  # the other is too large to stay
        assert cpu._dense(one, torch.bfloat16).dtype == torch.bfloat16
    cpu._dense(one, torch.float32)
    assert len(made) == 5
