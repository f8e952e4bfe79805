"""Experts stored in 8 bits and read as they lie."""

import pytest
import torch
from cases import assert_close, make_case, truth

from saml_kernels import quantize, saml_linear, saml_linear_routed
from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton.configs import ROUTES


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("m", "rank", "block", "speakers"), [(3, 4, 128, None), (40, 3, 128, None), (9, 5, 32, 3)]
)
def test_against_float64(route, m, rank, block, speakers, device):
    case = make_case(m, m, 70, 100, 3, rank, speakers=speakers, device=device)
    a, b = (
        quantize(t.cpu(), "int8", block, double_quant=False).to(device)
        for t in (case.lora_a, case.lora_b)
    )
    y = backend.forward(
        case.x, case.weight, a, b, case.gates, case.bias, case.scaling, case.speakers, route=route
    )
    case.lora_a, case.lora_b = a.dequantize(torch.float32), b.dequantize(torch.float32)
    assert_close(y, truth(case)[0], 2e-6, "y", truth(case, absolute=True)[0])


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_through_the_operator(name, device):
    """Read as they lie or dequantised first, with and without a gradient."""
    case = make_case(1, 6, 40, 128, 3, 4, device=device)
    a, b = (
        quantize(t.cpu(), "int8", 128, double_quant=False).to(device)
        for t in (case.lora_a, case.lora_b)
    )
    dense = (a.dequantize(torch.float32), b.dequantize(torch.float32))
    wanted = saml_linear(case.x, case.weight, *dense, case.gates, case.bias, backend=name)
    found = saml_linear(case.x, case.weight, a, b, case.gates, case.bias, backend=name)
    torch.testing.assert_close(found, wanted)
    x = case.x.clone().requires_grad_()
    torch.testing.assert_close(
        saml_linear(x, case.weight, a, b, case.gates, case.bias, backend=name), wanted
    )
    router = torch.randn(3, 128, device=device)
    torch.testing.assert_close(
        saml_linear_routed(case.x, case.weight, a, b, router, backend=name),
        saml_linear_routed(case.x, case.weight, *dense, router, backend=name),
    )
