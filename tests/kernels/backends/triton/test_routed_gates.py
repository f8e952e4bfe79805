"""Gates made inside the kernels: output and every gradient, the router's too, against float64."""

import pytest
import torch
from cases import LAYOUTS, REAL_WIDTH, assert_close, draw_case, laid_out, make_case, many
from hypothesis import given
from hypothesis import strategies as st
from routed_cases import NAMES, check_answers, make_router, truth
from torch import library
from ways import APART, WAYS, fitting

from saml_kernels import saml_linear_routed
from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton.configs import ROUTES
from saml_kernels.ops.registration import parts_of


def check(case, seed, top_k, temperature, route, layout="whole"):
    top_k = None if top_k is None else min(top_k, case.lora_a.shape[-3])
    router = laid_out(make_router(case, seed, top_k, temperature), layout)
    arguments = (case.weight, case.lora_a, case.lora_b, router)
    how = {"speakers": case.speakers, "routing": (top_k, temperature), "route": route}
    found = [
        backend.forward(case.x, *arguments, case.bias, case.scaling, **how),
        *backend.backward(case.dy, case.x, *arguments, case.scaling, (True,) * 4, **how),
    ]
    check_answers(case, router, top_k, temperature, found)


@many
@given(data=st.data())
def test_random_shapes(data, device):
    draw = data.draw
    case, seed = draw_case(draw, device), draw(st.integers(0, 2**32), "router")
    top_k = draw(st.sampled_from((None, 1, 2)), "top_k")
    temperature = draw(st.sampled_from((1.0, 0.5, 2.0)), "temperature")
    layout = draw(st.sampled_from(LAYOUTS), "layout of the router")
    way = draw(WAYS, "way")
    with fitting(way):
        check(case, seed, top_k, temperature, way, layout)


@pytest.mark.parametrize("route", APART)
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("m", [1, 5, 40])
def test_routes_at_whisper_widths(m, top_k, route, device):
    check(make_case(m, m, 384, 384, 4, 4, device=device), m, top_k, 1.0, route)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("experts", "rank"), [(4, 16), (16, 4)], ids=["R+E=68", "R+E=80"])
def test_aligned_as_real_layers_are(experts, rank, route, device):
    """Compiled, tiles of such sizes are copied ahead of their use, which others are not."""
    sizes = (300, REAL_WIDTH, REAL_WIDTH, experts, rank)
    case = make_case(12, *sizes, dtype=torch.float16, device=device)
    check(case, 13, None, 1.0, route)


@pytest.mark.parametrize("layout", ["offset", "strided"])
@pytest.mark.parametrize("route", ROUTES)
def test_tensors_that_lie_askew(route, layout, device):
    case = make_case(14, 20, 128, 128, 4, 16, dtype=torch.float16, device=device)
    for name in ("x", "dy", "lora_a", "lora_b"):
        setattr(case, name, laid_out(getattr(case, name), layout))
    check(case, 15, 2, 1.0, route, layout)


@pytest.mark.parametrize("needs", [(i & 1 > 0, i & 2 > 0, i & 4 > 0, i & 8 > 0) for i in range(16)])
def test_only_what_is_wanted(needs, device):
    case = make_case(5, 8, 32, 64, 2, 3, device=device)
    router = make_router(case, 6, None, 1.0)
    grads = backend.backward(
        case.dy, case.x, case.weight, case.lora_a, case.lora_b, router, case.scaling, needs,
        routing=(None, 1.0),
    )  # fmt: skip
    for grad, need, expected in zip(grads, needs, truth(case, router, None, 1.0)[1:], strict=True):
        assert (grad is not None) == need
        if need:
            assert_close(grad, expected, 4e-6, "gradient")


def test_equal_logits_keep_the_first(device):
    """A router that has learnt nothing yet: top 2 of four equal gates are the first two."""
    case = make_case(6, 4, 32, 64, 4, 3, device=device)
    router = torch.zeros(4, 64, device=device)
    how = {"routing": (2, 1.0)}
    y = backend.forward(
        case.x, case.weight, case.lora_a, case.lora_b, router, case.bias, 0.75, **how
    )
    gates = torch.tensor([0.5, 0.5, 0.0, 0.0], device=device).expand(4, 4)
    expected = backend.forward(
        case.x, case.weight, case.lora_a, case.lora_b, gates, case.bias, 0.75
    )
    torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck(device):
    case = make_case(9, 3, 8, 32, 2, 2, block_size=32, device=device)
    router = make_router(case, 10, None, 1.0)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.lora_a, case.lora_b, router)]

    def run(x, a, b, v):
        return saml_linear_routed(x, case.weight, a, b, v, case.bias, 0.5, backend="triton")

    # The kernels are float32: steps and tolerances to match.
    torch.autograd.gradcheck(run, leaves, eps=1e-2, atol=3e-2, rtol=1e-2, nondet_tol=0.0)


def test_through_the_operator(device):
    case = make_case(7, 12, 40, 128, 3, 4, device=device)
    router = make_router(case, 8, 2, 1.5)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.lora_a, case.lora_b, router)]
    x, a, b, v = leaves
    y = saml_linear_routed(
        x.view(3, 4, 128), case.weight, a, b, v, case.bias, case.scaling, 2, 1.5, "triton"
    )
    y.backward(case.dy.view(3, 4, 40))
    found = (y.detach().view(12, 40), *(t.grad for t in leaves))
    for name, tensor, wanted in zip(NAMES, found, truth(case, router, 2, 1.5), strict=True):
        assert_close(tensor, wanted, 4e-6, name)
    arguments = (x, *parts_of(case.weight), a, b, v, case.bias, 0.5, "triton", None, 2, 1.5)
    library.opcheck(torch.ops.saml_kernels.linear.default, arguments)
