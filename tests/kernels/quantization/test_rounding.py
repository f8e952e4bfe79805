"""Rounding for a layer's inputs: exact against plain loops, and better than `quantize`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saml_kernels import QuantizedTensor, SAMLError, quantize
from saml_kernels.quantization.codes import FORMATS, code_table
from saml_kernels.quantization.rounding import output_error, round_calibrated, round_together

DAMPING = 0.05


def realistic(width: int, seed: int = 0) -> Tensor:
    """A second moment as layers' inputs have it: unequal directions, outlying channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -1.5, width)[:, None]
    x = torch.randn(6 * width, width, generator=generator) @ mix / width**0.5
    x[:, :: max(2, width // 5)] *= 4
    return x.T @ x / len(x)


def weights(height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(height, width, generator=generator) * 0.05


def levels(format: str) -> Tensor:
    """The values that `quantize` uses, float64."""
    table = code_table(format).double()
    return table[table >= -1] if format.startswith("int") else table


def element_scales(tensor: QuantizedTensor) -> Tensor:
    scales = tensor.scales().repeat_interleave(tensor.block_size)
    return scales[: tensor.shape.numel()].view(tensor.shape).double()


def damped(moment: Tensor, damping: float = DAMPING) -> Tensor:
    moment = moment.double()
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment)).double()


def gptq_by_loops(weight: Tensor, scales: Tensor, moment: Tensor, format: str) -> Tensor:
    """GPTQ's equations 2 and 3 with the inverse taken anew for every column that is left."""
    values = levels(format)
    weight, rounded = weight.double().clone(), torch.zeros_like(weight).double()
    left = damped(moment).diagonal().argsort(descending=True, stable=True).tolist()
    while left:
        inverse = torch.linalg.inv(damped(moment)[left][:, left])
        k, rest = left[0], left[1:]
        near = (weight[:, k, None] / scales[:, k, None] - values).abs().argmin(dim=1)
        rounded[:, k] = values[near] * scales[:, k]
        error = (weight[:, k] - rounded[:, k]) / inverse[0, 0]
        weight[:, rest] -= error[:, None] * inverse[0, 1:]
        left = rest
    return rounded


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(40, 64), (7, 40), (5, 96)])
def test_codes_are_those_of_plain_gptq(format: str, shape: tuple[int, int]) -> None:
    weight, moment = weights(*shape), realistic(shape[1])
    found = round_calibrated(weight, moment, format, 32, search=False, refinements=0)
    expected = gptq_by_loops(weight, element_scales(found), moment, format)
    # One tie that float32 decides otherwise changes what follows in its row, and nothing else.
    same = torch.isclose(found.dequantize().double(), expected, atol=1e-6).all(dim=1)
    assert same.double().mean() >= 0.85
    lost = output_error(weight, found.dequantize(), damped(moment))
    assert lost == pytest.approx(output_error(weight, expected, damped(moment)), rel=0.02)


def refine_by_loops(tensor: QuantizedTensor, weight: Tensor, moment: Tensor) -> Tensor:
    """Codes moved one at a time, row by row, each to where the whole error is least."""
    values, scales = levels(tensor.format), element_scales(tensor)
    rounded, hessian = tensor.dequantize(torch.float64), damped(moment)
    for row in range(len(rounded)):
        for k in range(rounded.shape[1]):
            errors = []
            for value in values:
                rounded[row, k] = value * scales[row, k]
                lost = weight[row].double() - rounded[row]
                errors.append(float(lost @ hessian @ lost))
            rounded[row, k] = values[torch.tensor(errors).argmin()] * scales[row, k]
    return rounded


def test_refinement_is_coordinate_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    from saml_kernels.quantization import rounding

    weight, moment = weights(6, 40), realistic(40)
    before = round_calibrated(weight, moment, block_size=32, refinements=0)
    expected = refine_by_loops(before, weight, moment)
    monkeypatch.setattr(rounding, "_refit", lambda *_: None)
    found = round_calibrated(weight, moment, block_size=32, refinements=1)
    same = torch.isclose(found.dequantize().double(), expected, atol=1e-6)
    assert same.double().mean() > 0.97
    assert not torch.equal(found.codes, before.codes)


@pytest.mark.parametrize("double_quant", [True, False])
def test_no_single_scale_can_be_improved_before_the_codes_move(
    double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saml_kernels.quantization import rounding

    weight, moment = weights(9, 40), realistic(40)
    monkeypatch.setattr(rounding, "_descend", lambda *_: None)
    options = {"block_size": 32, "double_quant": double_quant}
    found = round_calibrated(weight, moment, refinements=60, **options)
    units = found.dequantize().double() / element_scales(found)
    least = output_error(weight, found.dequantize(), damped(moment))
    for block in range(len(found.absmax)):
        for other in (-1, 1):
            absmax = found.absmax.clone()
            absmax[block] = (
                absmax[block] + other if double_quant else absmax[block] * (1 + other / 50)
            )
            changed = QuantizedTensor(
                found.codes, absmax, found.nested_absmax, found.offset, found.shape, "nf4", 32
            )
            tried = units * element_scales(changed)
            assert output_error(weight, tried, damped(moment)) >= least * (1 - 1e-6)


STEPS = (
    {"search": False, "gptq": False, "refinements": 0},
    {"gptq": False, "refinements": 0},
    {"refinements": 0},
    {"refinements": 1},
)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(128, 96), (50, 240), (33, 35), (24, 8, 3), (6, 8, 3, 3)])
def test_every_step_lowers_the_error(format: str, shape: tuple[int, ...]) -> None:
    weight = weights(shape[0], torch.Size(shape[1:]).numel()).view(shape)
    moment = realistic(weight[0].numel())
    errors = []
    for options in STEPS:
        found = round_calibrated(weight, moment, format, **options)
        assert found.shape == weight.shape and found.format == format
        errors.append(output_error(weight, found.dequantize(), moment))
    plain = output_error(weight, quantize(weight, format).dequantize(), moment)
    # Nearest codes, where `quantize` rounds relative to the scale that it had before storing it.
    assert errors[0] <= plain * 1.1
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 0.5 * plain


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    format=st.sampled_from(FORMATS),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    double_quant=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_any_shape_is_a_whole_tensor_of_the_format(
    height: int,
    width: int,
    format: str,
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    weight = weights(height, width, seed).to(dtype)
    moment = realistic(width, seed)
    found = round_calibrated(weight, moment, format, block_size, double_quant).validate()
    plain = quantize(weight, format, block_size, double_quant)
    assert found.nbytes == plain.nbytes
    # What is claimed is what is stored: the codes' values times the stored scales.
    codes = found.codes
    if format != "int8":
        codes = torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)[: weight.numel()]
    values = code_table(format)[codes.view(torch.uint8).int()].view(weight.shape)
    assert torch.equal(found.dequantize(), values * element_scales(found).float())
    if format.startswith("int"):
        assert values.min() >= -1
    lost = output_error(weight, found.dequantize(), damped(moment))
    nearest = output_error(weight, plain.dequantize(), damped(moment))
    # A handful of weights leave little to trade one error against another.
    spare = output_error(weight, torch.zeros_like(weight), damped(moment))
    assert lost <= nearest * 1.05 + spare * (1e-3 if weight.numel() >= 16 else 0.05)


def test_together_is_as_alone() -> None:
    moment = realistic(48)
    several = [weights(20, 48, 1), weights(33, 48, 2), weights(7, 48, 3)]
    found = round_together(several, moment)
    for weight, one in zip(several, found, strict=True):
        alone = round_calibrated(weight, moment)
        assert one.shape == weight.shape
        lost = output_error(weight, one.dequantize(), moment)
        assert lost == pytest.approx(output_error(weight, alone.dequantize(), moment), rel=0.02)
        assert (one.codes == alone.codes).double().mean() > 0.95


def test_scale_of_the_moment_does_not_matter() -> None:
    weight, moment = weights(16, 64), realistic(64)
    one, other = (round_calibrated(weight, moment * factor) for factor in (1.0, 2.0**20))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.absmax, other.absmax)


def test_inputs_that_were_never_there() -> None:
    weight, moment = weights(30, 96), realistic(96)
    moment[:, 10:20] = 0
    moment[10:20] = 0
    found = round_calibrated(weight, moment)
    scales = element_scales(found)[:, 10:20]
    # Nothing pulls these columns anywhere: they are at the nearest values.
    values = levels("nf4")
    distance = (weight[:, 10:20, None].double() - values * scales[..., None]).abs()
    nearest = distance.amin(dim=2)
    lost = (weight.double() - found.dequantize().double())[:, 10:20].abs()
    torch.testing.assert_close(lost, nearest, atol=1e-6, rtol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_few_inputs_and_none(format: str) -> None:
    weight = weights(24, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    few = round_calibrated(weight, x.T @ x, format)
    assert torch.isfinite(few.dequantize()).all()
    plain = quantize(weight, format)
    assert output_error(weight, few.dequantize(), x.T @ x) < output_error(
        weight, plain.dequantize(), x.T @ x
    )
    none = round_calibrated(weight, torch.zeros(64, 64), format).dequantize()
    unit = torch.eye(64)
    assert output_error(weight, none, unit) <= output_error(weight, plain.dequantize(), unit)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_blocks_of_zeros_stay_zero(format: str, double_quant: bool) -> None:
    weight = weights(4, 128)
    weight[1] = 0
    found = round_calibrated(weight, realistic(128), format, double_quant=double_quant)
    assert torch.isfinite(found.dequantize()).all()
    assert torch.count_nonzero(found.dequantize()[1]) == 0
    zeros = round_calibrated(torch.zeros(4, 128), realistic(128), format)
    assert torch.count_nonzero(zeros.dequantize()) == 0


def test_what_does_not_fit_is_named() -> None:
    weight, moment = weights(4, 32), realistic(32)
    with pytest.raises(SAMLError, match=r"proj: moment .*32 inputs"):
        round_calibrated(weight, realistic(16), name="proj")
    with pytest.raises(SAMLError, match="NaN"):
        round_calibrated(weight, moment * float("nan"))
    with pytest.raises(SAMLError, match="NaN"):
        round_calibrated(weight / 0.0, moment)
    with pytest.raises(SAMLError, match="format"):
        round_calibrated(weight, moment, "nf3")
    with pytest.raises(SAMLError, match="semidefinite"):
        round_calibrated(weight, torch.eye(32) - 0.2)
    with pytest.raises(SAMLError, match="two or more dimensions"):
        round_calibrated(weight[0], moment)
