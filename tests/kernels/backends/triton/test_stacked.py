"""[W ; A] as one product of cuBLAS (PyTorch's own on a CPU), the experts on top of its result."""

from types import SimpleNamespace

import pytest
import routed_cases
import torch
from cases import TOLERANCE, assert_close, check_answers, make_case, truth
from routed_cases import make_router

from saml_kernels import quantize
from saml_kernels.backends.reference import route as gates_of
from saml_kernels.backends.triton.backend import expert_parts, facts_of, forward
from saml_kernels.backends.triton.facts import weight_parts
from saml_kernels.backends.triton.plan import backward_plan, forward_plan

ROUTE = "stacked"


@pytest.mark.parametrize("m", [1, 130])
def test_at_a_whispers_width(m, device):
    case = make_case(m, m, 384, 384, 4, 4, device=device)
    y = forward(case.x, case.weight, *case.experts, case.bias, case.scaling, route=ROUTE)
    assert_close(y, truth(case)[0], TOLERANCE[torch.float32], "y", truth(case, absolute=True)[0])


def facts(case, gates, routing, **more):
    given = (case.x, case.weight, case.lora_a, case.lora_b, gates, more.pop("bias", None))
    return facts_of(*given, case.speakers, routing, route=ROUTE, **more)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "int4"])
@pytest.mark.parametrize(("m", "n", "k"), [(9, 70, 128), (1, 37, 100)], ids=["aligned", "odd"])
def test_formats(format, m, n, k, device):
    case = make_case(0, m, n, k, 3, 5, format=format, dtype=torch.float16, device=device)
    given = (case.weight, *case.experts, case.bias, case.scaling)
    y, size = forward(case.x, *given, route=ROUTE), truth(case, absolute=True)[0]
    assert_close(y, truth(case)[0], TOLERANCE[torch.float16], "y", size)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("routing", [None, (2, 0.5)], ids=["given gates", "top 2"])
def test_what_it_keeps_does_for_the_backward(routing, dtype, device):
    case = make_case(1, 70, 40, 128, 4, 4, dtype=dtype, device=device)
    gates = case.gates if routing is None else make_router(case, 2, *routing)
    a, b, parts = case.lora_a, case.lora_b, weight_parts(case.weight)
    plan = forward_plan(facts(case, gates, routing, bias=case.bias), True)
    assert plan.route == ROUTE
    y, plain, made = plan(
        case.x, parts, *expert_parts(a), *expert_parts(b), gates, case.bias, None, case.scaling
    )
    assert plain.dtype == torch.float32 and (made is None) == (routing is None)
    back = backward_plan(facts(case, gates, routing, dy=case.dy), (True,) * 4, True)
    found = (y, *back(case.dy, case.x, parts, a, b, gates, None, case.scaling, plain, made))
    if routing is None:
        check_answers(case, found)
    else:
        assert_close(
            made, gates_of(case.x.double().cpu(), gates.double().cpu(), *routing), 1e-3, "g"
        )
        routed_cases.check_answers(case, gates, *routing, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_that_rounding_would_make_equal_choose_as_they_are(dtype, device):
    """64 and 64.0156, where numbers of these types lie 0.0625 and 0.5 apart."""
    case = make_case(3, 5, 24, 64, 4, 4, dtype=dtype, device=device)
    case.x.fill_(1)
    router = torch.ones(4, 64, dtype=dtype, device=device)
    router[2, 0] += 2**-6
    given = (case.x, case.weight, case.lora_a, case.lora_b)
    y = forward(*given, router, case.bias, 0.75, routing=(1, 1.0), route=ROUTE)
    only = torch.zeros(5, 4, dtype=dtype, device=device)
    only[:, 2] = 1
    case.gates = only
    assert_close(y, truth(case)[0], TOLERANCE[dtype], "y", truth(case, absolute=True)[0])


def test_many_speakers_and_no_experts_go_other_ways(device):
    many = make_case(4, 6, 24, 64, 2, 4, speakers=3, device=device)
    assert forward_plan(facts(many, many.gates, None), False).route == "dense"
    bare = make_case(5, 6, 24, 64, 0, 4, device=device)
    assert forward_plan(facts(bare, bare.gates, None), False).route == "scratch"


def test_rows_of_two_formats_stay_apart(device):
    """Layers of a model may differ in format: each fills scratch of its own."""
    case = make_case(6, 8, 48, 64, 2, 4, device=device)
    source = case.weight.dequantize(torch.float32).cpu()
    given = (*case.experts, case.bias, case.scaling)
    for format in ("int8", "nf4", "int8"):
        case.weight = quantize(source, format).to(device)
        y = forward(case.x, case.weight, *given, route=ROUTE)
        assert_close(y, truth(case)[0], TOLERANCE[torch.float32], "y")


def test_the_product_on_a_gpu_is_asked_for_float32(monkeypatch):
    """PyTorch has `out_dtype` on CUDA alone: here for what it is called with."""
    from saml_kernels.backends.triton import stacked

    asked = []
    monkeypatch.setattr(torch, "mm", lambda *given, **how: asked.append((*given, how)))
    x, weight = SimpleNamespace(is_cuda=True, dtype=torch.float16), torch.ones(3, 2)
    stacked._float32_product(x, weight)
    ((left, right, how),) = asked
    assert left is x and right.shape == (2, 3) and how == {"out_dtype": torch.float32}
