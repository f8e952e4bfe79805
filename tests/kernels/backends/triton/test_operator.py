"""The Triton backend through `saml_linear`: autograd, opcheck, gradcheck, compile, layouts."""

import pytest
import torch
from cases import TOLERANCE, assert_close, make_case, truth
from torch import library

from saml_kernels import available_backends, quantize, saml_linear, saml_linear_routed
from saml_kernels.backends.triton import launcher
from saml_kernels.ops.registration import parts_of


def leaves(case):
    return [t.clone().requires_grad_() for t in (case.x, *case.experts, case.bias)]


def test_listed():
    assert "triton" in available_backends()


def test_autograd(device):
    case = make_case(0, 12, 40, 128, 3, 4, device=device)
    x, a, b, g, bias = leaves(case)
    y = saml_linear(x, case.weight, a, b, g, bias, case.scaling, backend="triton")
    y.backward(case.dy)
    found = (y.detach(), x.grad, a.grad, b.grad, g.grad)
    for tensor, expected in zip(found, truth(case), strict=True):
        assert_close(tensor, expected, 2e-6, "autograd")
    torch.testing.assert_close(bias.grad, case.dy.sum(0))


def test_opcheck(device):
    case = make_case(1, 6, 24, 64, 2, 3, device=device)
    x, a, b, g, bias = leaves(case)
    arguments = (x, *parts_of(case.weight), a, b, g, bias, 0.5, "triton", None)
    library.opcheck(torch.ops.saml_kernels.linear.default, arguments)


@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck(device):
    case = make_case(2, 3, 8, 32, 2, 2, block_size=32, device=device)
    x, a, b, g, bias = leaves(case)

    def run(*leaf):
        return saml_linear(leaf[0], case.weight, *leaf[1:4], leaf[4], 0.5, backend="triton")

    # The kernels are float32: steps and tolerances to match.
    torch.autograd.gradcheck(
        run, (x, a, b, g, bias), eps=1e-2, atol=2e-2, rtol=1e-2, nondet_tol=0.0
    )


def test_leading_dimensions_and_strides(device):
    case = make_case(3, 24, 40, 128, 3, 4, device=device)
    x = case.x.view(4, 6, 128).transpose(0, 1)
    g = case.gates.view(4, 6, 3).transpose(0, 1)
    y = saml_linear(x, case.weight, case.lora_a, case.lora_b, g, case.bias, 0.75, "triton")
    assert_close(y.transpose(0, 1).reshape(24, 40), truth(case)[0], 2e-6, "y")


def test_zero_rows(device):
    case = make_case(4, 0, 40, 128, 3, 4, device=device)
    x, a, b, g, bias = leaves(case)
    y = saml_linear(x, case.weight, a, b, g, bias, backend="triton")
    y.sum().backward()
    assert y.shape == (0, 40) and not a.grad.any() and not b.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, device):
    case = make_case(5, 12, 40, 128, 3, 4, device=device)
    with torch.autocast(device, dtype):
        y = saml_linear(case.x, case.weight, *case.experts, case.bias, 0.75, "triton")
    assert y.dtype == dtype
    assert_close(y, truth(case)[0], 6 * TOLERANCE[dtype], "y")


def test_compile_fullgraph(device):
    case = make_case(6, 12, 40, 128, 3, 4, device=device)

    def run(x):
        y = saml_linear(x, case.weight, *case.experts, case.bias, 0.75, "triton")
        return torch.relu(y)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.x), run(case.x), rtol=0, atol=0)


def test_float64_goes_to_the_reference(device):
    case = make_case(7, 2, 8, 32, 1, 1, block_size=32, device=device)
    weight = quantize(torch.randn(8, 32), block_size=32).to(device)
    wide = [t.double() for t in (case.x, *case.experts)]
    y = saml_linear(wide[0], weight, *wide[1:])
    assert y.dtype == torch.float64


@pytest.mark.parametrize("routing", [None, (2, 0.5)], ids=["given gates", "top 2"])
@pytest.mark.parametrize("m", [12, 0])
def test_a_compiled_graph_keeps_p(m, routing, device, monkeypatch):
    """Its backward projects nothing again; values and gradients are those of an eager call."""
    names, call = [], launcher.Launcher.__call__
    monkeypatch.setattr(
        launcher.Launcher, "__call__", lambda self, *a: (names.append(self.name), call(self, *a))
    )
    case = make_case(8, m, 40, 128, 3, 4, device=device)
    x, a, b, g, bias = leaves(case)
    if routing is not None:
        g = torch.randn(3, 128, device=device).requires_grad_()
    tensors = (x, a, b, g, bias)

    def run(x, a, b, g, bias):
        if routing is None:
            return saml_linear(x, case.weight, a, b, g, bias, 0.75, "triton")
        return saml_linear_routed(x, case.weight, a, b, g, bias, 0.75, *routing, "triton")

    found = []
    for act in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y = act(*tensors)
        names.clear()
        found.append((y, *torch.autograd.grad(y, tensors, case.dy)))
        assert names == (["backward", "gradients"] if m else [])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_opcheck_of_what_keeps_p(device):
    case = make_case(9, 5, 24, 64, 2, 4, device=device)
    x, a, b, g, bias = leaves(case)
    arguments = (x, *parts_of(case.weight), a, b, g, bias, 0.75, "triton", None)
    library.opcheck(torch.ops.saml_kernels.linear_kept.default, arguments)
