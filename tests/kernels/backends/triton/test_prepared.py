"""Calls prepared for a layer: what rows share, what is read as it lies, when it is made anew."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from cases import TOLERANCE, assert_close, make_case, truth

from saml_kernels import quantize, saml_linear, saml_linear_routed
from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton.configs import ROUTES
from saml_kernels.ops.prepared import Prepared


def gradients(y, leaves):
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).to(y)
    return torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize(
    "shape", [(3,), (1, 3), (4, 3), (1, 1, 3), (2, 1, 3), (1, 4, 3), (2, 4, 3)]
)
def test_rows_share_gates(shape, device):
    case = make_case(0, 8, 40, 128, 3, 4, device=device)
    gates = torch.rand(shape, device=device, requires_grad=True)
    leaves = [t.clone().requires_grad_() for t in (case.x.view(2, 4, 128), *case.experts[:2])]
    found, expected = [], []
    for name, into in (("triton", found), ("reference", expected)):
        y = saml_linear(leaves[0], case.weight, *leaves[1:], gates, case.bias, 0.75, name)
        into += [y, *gradients(y, [*leaves, gates])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4), (4,)])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_rows_share_a_speaker(shape, kind, device):
    case = make_case(1, 8, 40, 128, 3, 4, speakers=3, device=device)
    index = torch.arange(torch.Size(shape).numel(), device=device).view(shape).to(kind) % 3
    whole = index.expand(2, 4).contiguous()
    router = torch.randn(3, 3, 128, device=device).requires_grad_()
    leaves = [t.clone().requires_grad_() for t in (case.x.view(2, 4, 128), *case.experts[:2])]
    results = []
    for name, speakers in (("triton", index), ("reference", whole)):
        given = (leaves[0], case.weight, *leaves[1:], router, case.bias, 0.75, 2, 1.0, name)
        y = saml_linear_routed(*given, speakers)
        results.append([y, *gradients(y, [*leaves, router])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_experts_in_float32_beside_half_precision(route, dtype, device):
    """Read as they lie; their gradients come in float32 as well."""
    case = make_case(2, 20, 64, 128, 4, 4, dtype=dtype, device=device)
    wide = [t.float() for t in (*case.experts, case.bias)]
    a, b, gates, bias = wide
    given = (case.weight, a, b, gates)
    y = backend.forward(case.x, *given, bias, case.scaling, route=route)
    grads = backend.backward(case.dy, case.x, *given, case.scaling, (True,) * 4, route=route)
    assert y.dtype == grads[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in grads[1:])
    answers = zip((y, *grads), truth(case), truth(case, absolute=True), strict=True)
    for found, expected, size in answers:
        assert_close(found, expected, TOLERANCE[dtype], "", size)


def test_the_reduction_over_tokens_is_shared_out(device):
    """Many shares for each tile of dA, dB and the gates' gradient, and the same bits twice."""
    case = make_case(3, 2100, 64, 64, 2, 4, device=device)
    given = (case.dy, case.x, case.weight, *case.experts, case.scaling, (False, True, True, True))
    first, second = (backend.backward(*given) for _ in range(2))
    for one, other, expected in zip(first[1:], second[1:], truth(case)[2:], strict=True):
        assert torch.equal(one, other)
        assert_close(one, expected, 2e-6, "gradient")


def layer(device):
    case = make_case(4, 6, 40, 128, 3, 4, device=device)
    a, b = (torch.nn.Parameter(t) for t in case.experts[:2])
    return case, a, b


def call(case, a, b):
    return saml_linear(case.x, case.weight, a, b, case.gates, case.bias, 0.75, "triton")


def test_made_once_and_kept_through_an_optimisers_step(device):
    case, a, b = layer(device)
    call(case, a, b).sum().backward()
    first = case.weight.prepared
    assert isinstance(first, Prepared)
    torch.optim.SGD([a, b], 0.1).step()
    y = call(case, a, b)
    assert case.weight.prepared is first
    case.lora_a, case.lora_b = a.detach(), b.detach()
    assert_close(y.detach(), truth(case)[0], 2e-6, "y")


@pytest.mark.parametrize("change", ["data", "dtype", "weight", "other"])
def test_made_anew_where_a_tensor_was_replaced(change, device):
    case, a, b = layer(device)
    call(case, a, b)
    first = case.weight.prepared
    if change == "data":
        a.data = a.data + 1
    elif change == "dtype":
        case.x, case.gates, case.bias = case.x.half(), case.gates.half(), case.bias.half()
        a.data, b.data = a.data.half(), b.data.half()
    elif change == "weight":
        other = quantize(torch.randn(40, 128)).to(device)
        case.weight.load_state_dict(other.state_dict())
        case.weight.codes = case.weight.codes.clone()
    else:
        a = torch.nn.Parameter(a.detach() + 1)
    y = call(case, a, b)
    assert case.weight.prepared is not first
    case.lora_a, case.lora_b = a.detach(), b.detach()
    assert_close(y.detach(), truth(case)[0], 2 * TOLERANCE[y.dtype], "y")


def test_new_values_in_place_are_seen(device):
    case, a, b = layer(device)
    call(case, a, b)
    first = case.weight.prepared
    with torch.no_grad():
        case.bias.add_(1)
        a.mul_(2)
    case.weight.load_state_dict(quantize(torch.randn(40, 128)).to(device).state_dict())
    y = call(case, a, b)
    assert case.weight.prepared is first
    case.lora_a = a.detach()
    assert_close(y.detach(), truth(case)[0], 2e-6, "y")


def test_never_copied_with_the_weight(device):
    case, a, b = layer(device)
    call(case, a, b)
    for other in (copy.deepcopy(case.weight), pickle.loads(pickle.dumps(case.weight))):
        assert other.prepared is None
    assert case.weight.prepared is not None


def test_a_moved_weight_leaves_nothing_behind(device):
    """What was prepared would keep the tensors that it was made for."""
    case, a, b = layer(device)
    call(case, a, b)
    case.weight.to(device)  # which is where it lies
    assert case.weight.prepared is not None
    codes = weakref.ref(case.weight.codes)
    case.weight._apply(torch.Tensor.clone)
    assert case.weight.prepared is None and codes() is None


def test_a_dropped_layer_is_gone_at_once(device):
    """No cycle keeps its memory until the garbage collector comes by."""
    case, a, b = layer(device)
    call(case, a, b).sum().backward()
    codes = weakref.ref(case.weight.codes)
    gc.disable()
    try:
        del case, a, b
        assert codes() is None
    finally:
        gc.enable()


def test_layers_share_no_launch_that_is_compiled_for_another_dtype(device):
    """Under autocast one layer reads float32 and the next bfloat16: dX is of x's dtype.

    The interpreter checks that a launcher's calls are all of the kind that it was compiled for.
    """
    case = make_case(4, 20, 64, 64, 2, 4, device=device)
    router = torch.randn(2, 64, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        weight = quantize(torch.randn(64, 64, device=device))
        x = torch.randn(20, 64, dtype=dtype, device=device, requires_grad=True)
        a, b = (t.clone().requires_grad_() for t in case.experts[:2])
        with torch.autocast(device, torch.bfloat16):
            for _ in range(2):  # the second call is the prepared one
                y = saml_linear_routed(x, weight, a, b, router, case.bias, 0.75, backend="triton")
                (dx,) = torch.autograd.grad(y.float().sum(), x)
        assert dx.dtype == dtype and dx.isfinite().all()


def test_a_copied_input_is_not_taken_for_an_aligned_one(device):
    """Both begin 8 bytes past a multiple of 16; the strided one is copied to where all is even."""
    case = make_case(5, 3, 32, 64, 2, 4, device=device)
    given = (case.weight, *case.experts[:2], torch.randn(2, 64, device=device), case.bias, 0.75)
    strided = torch.randn(3, 130, device=device)[:, 2::2]
    plain = torch.randn(194, device=device)[2:].view(3, 64)
    for x in (strided, strided, plain):
        y = saml_linear_routed(x, *given, backend="triton")
        torch.testing.assert_close(y, saml_linear_routed(x, *given, backend="reference"))


def test_experts_that_are_narrowed_in_place(device):
    case = make_case(6, 3, 32, 64, 4, 4, device=device)
    router = torch.randn(4, 64, device=device)
    experts = [*case.experts[:2], router]

    def both():
        given = (case.x, case.weight, *experts, case.bias, 0.75)
        return [saml_linear_routed(*given, backend=name) for name in ("triton", "reference")]

    both()
    for parameter in experts:
        parameter.data = parameter.data[:2]
    torch.testing.assert_close(*both())


def test_no_rows_after_some(device):
    case = make_case(7, 3, 32, 64, 2, 4, device=device)
    a, b = (t.clone().requires_grad_() for t in case.experts[:2])
    for rows in (3, 0):
        x = case.x[:rows].clone().requires_grad_()
        gates = case.experts[2][:1].clone().requires_grad_()
        y = saml_linear(x, case.weight, a, b, gates, case.bias, 0.75, backend="triton")
        assert y.shape == (rows, 32)
        grads = torch.autograd.grad(y.sum(), (x, a, b, gates))
    assert all(not g.any() for g in grads)
