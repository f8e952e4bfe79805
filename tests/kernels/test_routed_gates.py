"""Gates made inside the kernels: output and every gradient, the router's too, against float64."""

import pytest
import torch
from cases import TOLERANCE, assert_close, make_case
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_against_float64 import EXAMPLES

from saml_kernels import reference, saml_linear_routed
from saml_kernels import triton as backend
from saml_kernels.ops import _parts
from saml_kernels.triton.configs import ROUTES

NAMES = ("y", "dx", "da", "db", "drouter")


def make_router(case, seed, top_k, temperature):
    """A router whose k-th and next largest logits are well apart in every row of the case."""
    g = torch.Generator().manual_seed(seed)
    shape = case.lora_a.shape[:-2] + case.lora_a.shape[-1:]
    k = shape[-1]
    router = (torch.randn(*shape, generator=g) * (2 / k) ** 0.5).to(case.x).contiguous()
    kept = top_k or shape[-2]
    if kept < shape[-2] and len(case.x):
        index = None if case.speakers is None else case.speakers.cpu()
        gates = reference.route(case.x.double().cpu(), router.double().cpu(), None, 1.0, index)
        logits = gates.log().sort(-1, descending=True).values
        clear = (logits[:, kept - 1] - logits[:, kept]) > 0.05
        case.x[(~clear).to(case.x.device)] = 0  # all logits equal: no gradient tells them apart
        case.dy[(~clear).to(case.x.device)] = 0
    return router


def truth(case, router, top_k, temperature, absolute=False):
    """y, dx, da, db, drouter in float64 by autograd; `absolute` as in cases.truth."""

    def wide(tensor):
        return tensor.detach().double().cpu()

    index = None if case.speakers is None else case.speakers.cpu()
    x, a, b, v = (wide(t).requires_grad_() for t in (case.x, case.lora_a, case.lora_b, router))
    dense, bias = wide(case.weight.dequantize()), None if case.bias is None else wide(case.bias)
    dy = wide(case.dy)
    gates = reference.route(x, v, top_k, temperature, index)
    if absolute:
        gates = gates.detach()
        dense, dy = dense.abs(), dy.abs()
        bias = None if bias is None else bias.abs()
        x, a, b = (t.detach().abs().requires_grad_() for t in (x, a, b))
        gates.requires_grad_()
    y = torch.zeros(len(x), len(dense), dtype=torch.float64) + 0 * x.sum()
    for s in range(1 if index is None else len(a)):
        own = (a, b) if index is None else (a[s], b[s])
        part = reference.saml_linear_reference(x, dense, *own, gates, bias, case.scaling)
        mine = torch.ones(len(x), dtype=torch.bool) if index is None else index == s
        y = torch.where(mine.unsqueeze(1), part, y)
    y.backward(dy)
    if absolute:  # what the logits' gradient sums up, then the router's own product
        flow = gates * gates.grad * 2 / temperature
        people = torch.zeros(len(x), dtype=torch.long) if index is None else index.long()
        dv = torch.zeros(*wide(router).reshape(-1, *router.shape[-2:]).shape, dtype=torch.float64)
        for s in range(len(dv)):
            mine = people == s
            dv[s] = flow[mine].detach().T @ x[mine].detach()
        full = wide(router).abs().reshape(dv.shape)
        dx = x.grad + torch.einsum("me,mek->mk", flow.detach(), full[people])
        return y.detach(), dx, a.grad, b.grad, dv.reshape(router.shape)
    zero = (torch.zeros_like(t) if t.grad is None else t.grad for t in (x, a, b, v))
    return y.detach(), *zero


def check(case, seed, top_k, temperature, route):
    top_k = None if top_k is None else min(top_k, case.lora_a.shape[-3])
    router = make_router(case, seed, top_k, temperature)
    arguments = (case.weight, case.lora_a, case.lora_b, router)
    how = {"speakers": case.speakers, "routing": (top_k, temperature), "route": route}
    found = [
        backend.forward(case.x, *arguments, case.bias, case.scaling, **how),
        *backend.backward(case.dy, case.x, *arguments, case.scaling, (True,) * 4, **how),
    ]
    expected = truth(case, router, top_k, temperature)
    sizes = truth(case, router, top_k, temperature, absolute=True)
    for name, tensor, wanted, size in zip(NAMES, found, expected, sizes, strict=True):
        assert tensor is not None and tensor.dtype == case.x.dtype
        assert_close(tensor, wanted, 2 * TOLERANCE[case.x.dtype], name, size)


@settings(
    max_examples=EXAMPLES, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_random_shapes(data, device):
    draw = data.draw
    experts = draw(st.integers(1, 16), "E")
    rank = draw(st.integers(1, 64 if experts <= 4 else 8), "r")
    seed = draw(st.integers(0, 2**32), "seed")
    case = make_case(
        seed, draw(st.integers(0, 200), "M"), draw(st.integers(1, 130), "N"),
        draw(st.one_of(st.sampled_from((64, 128)), st.integers(1, 150)), "K"), experts, rank,
        format=draw(st.sampled_from(("nf4", "fp4", "int8", "int4")), "format"),
        dtype=draw(st.sampled_from(tuple(TOLERANCE)), "dtype"),
        speakers=draw(st.sampled_from((None, None, 1, 3, 7)), "speakers"),
        bias=draw(st.booleans(), "bias"), device=device,
    )  # fmt: skip
    top_k = draw(st.sampled_from((None, 1, 2)), "top_k")
    temperature = draw(st.sampled_from((1.0, 0.5, 2.0)), "temperature")
    check(case, seed + 1, top_k, temperature, draw(st.sampled_from((None, *ROUTES)), "route"))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("m", [1, 5, 40])
def test_routes_at_whisper_widths(m, top_k, route, device):
    check(make_case(m, m, 384, 384, 4, 4, device=device), m, top_k, 1.0, route)


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
    arguments = (x, *_parts(case.weight), a, b, v, case.bias, 0.5, "triton", None, 2, 1.5)
    torch.library.opcheck(torch.ops.saml_kernels.linear.default, arguments)
