"""Output and every gradient of the Triton backend against float64, on random shapes."""

from dataclasses import replace

import pytest
import torch
from cases import (
    REAL_WIDTH,
    TOLERANCE,
    assert_close,
    check_answers,
    draw_case,
    laid_out,
    make_case,
    many,
    truth,
)
from hypothesis import given
from hypothesis import strategies as st
from ways import APART, WAYS, fitting

from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton.configs import ROUTES, Config


def check(case, route):
    arguments = (case.weight, *case.experts)
    found = [
        backend.forward(case.x, *arguments, case.bias, case.scaling, case.speakers, route=route),
        *backend.backward(
            case.dy, case.x, *arguments, case.scaling, (True,) * 4, case.speakers, route=route
        ),
    ]
    check_answers(case, found)


@many
@given(data=st.data())
def test_random_shapes(data, device):
    draw = data.draw
    case, way = draw_case(draw, device), draw(WAYS, "way")
    with fitting(way):
        check(case, way)


@pytest.mark.parametrize("route", APART)
@pytest.mark.parametrize("m", [1, 5, 17, 130])
def test_routes_at_whisper_widths(m, route, device):
    check(make_case(m, m, 384, 384, 4, 4, device=device), route)


@pytest.mark.parametrize("route", ROUTES)
def test_aligned_as_real_layers_are(route, device):
    """Compiled, tiles of such sizes are copied ahead of their use, which others are not."""
    sizes = (300, REAL_WIDTH, REAL_WIDTH, 4, 16)
    check(make_case(10, *sizes, dtype=torch.float16, device=device), route)


@pytest.mark.parametrize("layout", ["offset", "strided"])
@pytest.mark.parametrize("route", ROUTES)
def test_tensors_that_lie_askew(route, layout, device):
    case = make_case(11, 20, 128, 128, 4, 16, dtype=torch.float16, device=device)
    for name in ("x", "dy", "lora_a", "lora_b", "gates"):
        setattr(case, name, laid_out(getattr(case, name), layout))
    check(case, route)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "int4"])
@pytest.mark.parametrize("k", [128, 100], ids=["aligned", "odd"])
def test_formats(format, k, device):
    check(make_case(0, 9, 70, k, 2, 4, format=format, device=device), "fused")


def test_no_experts(device):
    case = make_case(1, 20, 64, 128, 0, 4, device=device)
    y = backend.forward(case.x, case.weight, *case.experts, case.bias, 1.0)
    expected = case.x.double() @ case.weight.dequantize(torch.float64).T + case.bias.double()
    assert_close(y, expected.cpu(), 2e-6, "y")


@pytest.mark.parametrize("route", ["single", "decode", "fused", "split"])
@pytest.mark.parametrize("index", [-1, 3, 2**30])
def test_speaker_out_of_range_is_nan(index, route, device):
    case = make_case(2, 6, 64, 128, 2, 4, speakers=3, device=device)
    case.speakers[4] = index
    y = backend.forward(
        case.x, case.weight, *case.experts, case.bias, 1.0, case.speakers, route=route
    )
    bad = torch.isnan(y).all(1).cpu()
    assert bad.tolist() == [False] * 4 + [True] + [False]
    assert not torch.isnan(y[:4]).any()


def test_experts_nobody_chose_are_not_read(device):
    case = make_case(3, 4, 64, 128, 4, 4, device=device)
    case.gates[:, 2] = 0
    expected = backend.forward(case.x, case.weight, *case.experts, case.bias, 1.0)
    case.lora_a[2] = case.lora_b[2] = float("nan")
    y = backend.forward(case.x, case.weight, *case.experts, case.bias, 1.0)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_same_input_same_bits(device):
    case = make_case(4, 150, 96, 128, 4, 8, device=device)
    runs = [
        backend.backward(case.dy, case.x, case.weight, *case.experts, case.scaling, (True,) * 4)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("needs", [(i & 1 > 0, i & 2 > 0, i & 4 > 0, i & 8 > 0) for i in range(16)])
def test_only_what_is_wanted(needs, device):
    case = make_case(5, 8, 32, 64, 2, 3, device=device)
    grads = backend.backward(case.dy, case.x, case.weight, *case.experts, case.scaling, needs)
    for grad, need, expected in zip(grads, needs, truth(case)[1:], strict=True):
        assert (grad is not None) == need
        if need:
            assert_close(grad, expected, 2e-6, "gradient")


@pytest.mark.parametrize("route", ["decode", "split", "fused"])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "int4"])
def test_scale_after_the_product(format, route, device):
    """Within the rounding of the codes; where blocks do not end with the rows, as before it."""
    split = 1 if route == "fused" else 2
    config = Config(route, 16, 32, 64, split, scale="after")
    for dtype in TOLERANCE:
        for k in (128, 100):
            case = make_case(8, 5, 40, k, 2, 4, format=format, dtype=dtype, device=device)
            given = (case.x, case.weight, *case.experts, case.bias, case.scaling)
            found = backend.forward(*given, route=config)
            answer, size = truth(case)[0], truth(case, absolute=True)[0]
            assert_close(found, answer, TOLERANCE[dtype], f"{dtype}, K = {k}", size)
            if k == 100:
                before = backend.forward(*given, route=replace(config, scale="before"))
                torch.testing.assert_close(found, before, rtol=0, atol=0)
