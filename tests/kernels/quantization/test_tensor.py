"""Low-bit weights: bounded in error, stored as promised, and hard to break from a file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saml_kernels.errors import SAMLError
from saml_kernels.quantization import codes
from saml_kernels.quantization.tensor import FORMATS, QuantizedTensor, quantize


def weights(shape: tuple[int, ...], seed: int = 0, spread: float = 3.0) -> Tensor:
    """Normal values whose scale differs from row to row by factors of e^spread."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(spread * torch.randn(shape[0], generator=generator))
    return torch.randn(shape, generator=generator) * scale.view(-1, *[1] * (len(shape) - 1))


# Half the widest gap between two levels, relative to the scale.
HALF_STEP = {"nf4": 0.1520, "fp4": 0.1668, "int8": 0.5 / 127, "int4": 0.5 / 7}


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
    format=st.sampled_from(FORMATS),
    block=st.sampled_from([32, 64, 4096]),
)
def test_error_is_at_most_half_a_step(
    shape: list[int], exponent: int, seed: int, format: str, block: int
) -> None:
    weight = weights(tuple(shape), seed) * 10.0**exponent
    tensor = quantize(weight, format, block, double_quant=False)
    found = tensor.dequantize()
    assert found.shape == weight.shape == tensor.shape
    scale = tensor.scales().repeat_interleave(block)[: weight.numel()].view(weight.shape)
    assert ((found - weight).abs() <= scale * (HALF_STEP[format] * (1 + 1e-5))).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    seed=st.integers(0, 2**31),
    format=st.sampled_from(FORMATS),
)
def test_quantising_twice_changes_nothing(rows: int, columns: int, seed: int, format: str) -> None:
    """True with exact scales: every format has a code for plus or minus the largest magnitude."""
    once = quantize(weights((rows, columns), seed), format, double_quant=False)
    twice = quantize(once.dequantize(), format, double_quant=False)
    assert torch.equal(once.dequantize(), twice.dequantize())
    if format != "fp4":  # its two zeros are one value
        assert torch.equal(once.codes, twice.codes)


@pytest.mark.parametrize("format", FORMATS)
def test_double_quantisation_moves_scales_little(format: str) -> None:
    weight = torch.randn(400, 128, generator=torch.Generator().manual_seed(1))
    exact = quantize(weight, format, double_quant=False).scales()
    stored = quantize(weight, format)
    error = (stored.scales() - exact).abs().max() / (exact - exact.mean()).abs().max()
    assert stored.absmax.dtype == torch.uint8
    assert 0 < error < 0.01


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_integers_are_symmetric(format: str) -> None:
    weight = torch.tensor([1.0, -1.0, 0.0, 0.5])
    tensor = quantize(weight, format, double_quant=False)
    negated = quantize(-weight, format, double_quant=False)
    assert torch.equal(tensor.dequantize(), -negated.dequantize())
    assert tensor.dequantize()[:3].tolist() == [1, -1, 0]
    if format == "int4":
        assert tensor.codes.tolist() == [0xF1, 0x8C]  # 7 + 8, -7 + 8, 0 + 8, 4 + 8
    else:
        assert tensor.codes.tolist() == [127, -127, 0, 64]


def test_nf4_layout_by_hand() -> None:
    tensor = quantize(torch.tensor([1.0, -1.0, 0.0]), "nf4", double_quant=False)
    assert tensor.codes.tolist() == [0xF0, 0x77]  # the first in the high nibble; padded with zero
    assert tensor.absmax.tolist() == [1.0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(10, 128), (9, 100), (9, 33)], ids=str)
def test_rows_are_the_rows(format: str, shape: tuple[int, int]) -> None:
    for double_quant in (True, False):
        tensor = quantize(weights(shape), format, 64, double_quant)
        dense = tensor.dequantize(torch.bfloat16)
        for index in ([3, 0, 3, -1], [[1, 2], [8, 0]], []):
            rows = torch.tensor(index, dtype=torch.int64)
            assert torch.equal(tensor.rows(rows, torch.bfloat16), dense[rows])
        with pytest.raises(IndexError):
            tensor.rows(torch.tensor([shape[0]]))
    with pytest.raises(SAMLError, match="two dimensions"):
        quantize(torch.ones(64), format).rows(torch.tensor([0]))


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_counted_as_stored(format: str) -> None:
    tensor = quantize(weights((300, 64)), format)
    packed = 300 * 64 if format == "int8" else 300 * 32
    assert tensor.nbytes == packed + 300 + 2 * 4 + 4
    assert quantize(weights((300, 64)), format, double_quant=False).nbytes == packed + 300 * 4


def test_dequantize_rounds_once() -> None:
    tensor = quantize(weights((20, 64)), "nf4")
    assert tensor.dequantize().dtype == torch.float32
    assert torch.equal(tensor.dequantize(torch.float64), tensor.dequantize().double())
    assert torch.equal(tensor.dequantize(torch.float16), tensor.dequantize().half())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_not_finite_is_refused(bad: float, format: str) -> None:
    weight = torch.ones(3, 64)
    weight[1, 5] = bad
    with pytest.raises(SAMLError, match=r"^fc1: "):
        quantize(weight, format, name="fc1")


NO_WEIGHTS = {
    "empty": torch.empty(0),
    "no rows": torch.empty(0, 64),
    "integers": torch.ones(64, dtype=torch.int32),
    "complex": torch.ones(4) * 1j,
    "beyond float32": torch.full((64,), 1e300, dtype=torch.float64),
}


@pytest.mark.parametrize("weight", NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_what_is_no_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(SAMLError, match=r"^fc1: "):
        quantize(weight, name="fc1")


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(SAMLError, match="nf5"):
        quantize(torch.ones(64), "nf5")
    for block in (0, 48, 16, 8192):
        with pytest.raises(SAMLError, match="block_size"):
            quantize(torch.ones(64), block_size=block)


def test_scales_too_large_to_average_are_refused() -> None:
    weight = torch.full((4, 64), 3e38)
    with pytest.raises(SAMLError, match="double_quant=False"):
        quantize(weight)
    assert torch.equal(quantize(weight, double_quant=False).dequantize(), weight)


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_round_trip(format: str, double_quant: bool) -> None:
    tensor = quantize(weights((300, 65)), format, 64, double_quant)
    copied = QuantizedTensor.empty((300, 65), format, 64, double_quant)
    model, other = nn.ModuleDict({"weight": tensor}), nn.ModuleDict({"weight": copied})
    other.load_state_dict(model.state_dict())
    assert torch.equal(copied.dequantize(), tensor.dequantize())
    assert torch.equal(copy.deepcopy(tensor).dequantize(), tensor.dequantize())
    on_meta = QuantizedTensor.empty((300, 65), format, 64, double_quant, device="meta")
    on_meta.load_state_dict(tensor.state_dict(), assign=True)
    assert torch.equal(on_meta.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("codes", torch.zeros(127, dtype=torch.uint8)),
        ("codes", torch.zeros(128, dtype=torch.int8)),
        ("codes", torch.zeros(128, 1, dtype=torch.uint8)),
        ("absmax", torch.zeros(4)),
        ("absmax", torch.zeros(5, dtype=torch.uint8)),
        ("nested_absmax", torch.zeros(1, dtype=torch.float16)),
        ("nested_absmax", torch.tensor([float("inf")])),
        ("offset", torch.zeros(1)),
        ("offset", torch.tensor(float("nan"))),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.dtype}{list(v.shape)}",
)
def test_hostile_state_dict_is_refused(part: str, value: Tensor) -> None:
    model = nn.ModuleDict({"fc1": quantize(weights((4, 64)), "nf4")})
    state = model.state_dict() | {f"fc1.{part}": value}
    with pytest.raises(SAMLError, match=rf"^fc1\.{part}: "):
        model.load_state_dict(state)


def test_missing_and_surplus_parts_are_refused() -> None:
    double, single = (quantize(weights((4, 64)), "int8", 64, flag) for flag in (True, False))
    state = double.state_dict()
    del state["offset"]
    with pytest.raises(RuntimeError, match="offset"):
        double.load_state_dict(state)
    with pytest.raises(RuntimeError, match="nested_absmax"):
        surplus = {"nested_absmax": torch.zeros(1)}
        single.load_state_dict(single.state_dict() | surplus)


@pytest.mark.parametrize("shape", [(0, 4), (-1, -64), (2**40, 2**40), (4.0, 64)], ids=str)
def test_empty_refuses_absurd_shapes(shape: Any) -> None:
    with pytest.raises(SAMLError, match="shape"):
        QuantizedTensor.empty(shape)


def test_dtype_casts_leave_the_buffers_alone() -> None:
    for format in FORMATS:
        for double_quant in (True, False):
            tensor = quantize(weights((4, 64)), format, 64, double_quant)
            expected = tensor.dequantize()
            dtypes = {name: buffer.dtype for name, buffer in tensor.named_buffers()}
            for cast in (nn.Module.half, nn.Module.double, lambda m: m.to("cpu", torch.bfloat16)):
                cast(nn.ModuleList([tensor]))
                assert {name: buffer.dtype for name, buffer in tensor.named_buffers()} == dtypes
                assert torch.equal(tensor.dequantize(), expected)
            assert {b.device.type for b in tensor.to("meta").buffers()} == {"meta"}


def test_parameters_and_strides() -> None:
    weight = nn.Parameter(weights((64, 96)))
    tensor = quantize(weight.T)
    assert torch.equal(tensor.codes, quantize(weight.T.contiguous()).codes)
    assert not list(tensor.parameters())
    assert not tensor.dequantize().requires_grad


def test_default_dtype_is_no_concern_of_the_format() -> None:
    weight = weights((300, 64))
    expected = quantize(weight)
    codes.sorted_codes.cache_clear()
    codes.nested_lookup.cache_clear()
    torch.set_default_dtype(torch.float16)
    try:
        found = quantize(weight)
        values = found.dequantize()
        dtypes = [b.dtype for b in QuantizedTensor.empty((300, 64)).buffers()]
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes == [b.dtype for b in expected.buffers()]
    assert [b.dtype for b in found.buffers()] == dtypes
    assert torch.equal(values, expected.dequantize())


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_compiles_to_one_graph(format: str) -> None:
    tensor = quantize(weights((10, 100)), format)
    index = torch.tensor([3, 1])
    dense = torch.compile(lambda: tensor.dequantize(), fullgraph=True, backend="eager")
    rows = torch.compile(lambda i: tensor.rows(i), fullgraph=True, backend="eager")
    assert torch.equal(dense(), tensor.dequantize())
    assert torch.equal(rows(index), tensor.rows(index))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_on_the_meta_device_sizes_are_those_of_a_real_weight(format, double_quant) -> None:
    real = quantize(torch.randn(24, 100), format, 64, double_quant)
    empty = quantize(torch.empty(24, 100, device="meta"), format, 64, double_quant)
    described = [(n, b.shape, b.dtype) for n, b in empty.named_buffers()]
    assert described == [(n, b.shape, b.dtype) for n, b in real.named_buffers()]
    assert all(b.is_meta for b in empty.buffers())


def test_a_compiled_call_copies_no_table_from_the_host():
    """A CUDA graph cannot capture such a copy; the meta device stands for a GPU."""
    weight, graphs = quantize(torch.randn(64, 128)).to("meta"), []

    def recording(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda w: w.dequantize(), backend=recording, fullgraph=True)
    for _ in range(3):  # the first may put the tables there
        compiled(weight)
    torch.compiler.reset()
    last = graphs[-1]
    assert any("meta_nf4_pairs" in t for t in last) and any("meta_nested" in t for t in last)
    assert not any("TABLES" in target for target in last)
