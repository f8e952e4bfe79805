"""The persistent product by tensor descriptors: against float64, and where it is not offered."""

from dataclasses import replace

import pytest
import routed_cases
import torch
from cases import TOLERANCE, assert_close, laid_out, make_case, truth
from routed_cases import make_router

from saml_kernels.backends.triton import launcher
from saml_kernels.backends.triton.backend import facts_of, forward
from saml_kernels.backends.triton.configs import (
    Config,
    device_traits,
    from_hopper,
    pretending,
)
from saml_kernels.backends.triton.plan import forward_plan

WAY = Config("dense", 32, 32, 64, 1, loads="descriptors")


@pytest.fixture(autouse=True)
def few_processors():
    """Each program goes over several tiles."""
    with pretending("", 3):
        yield


@pytest.fixture
def launched(monkeypatch, device):
    """Names of the kernels that are started."""
    if not from_hopper(device_traits(torch.device(device))[0]):
        pytest.skip("no tensor memory accelerator")
    names, call = [], launcher.Launcher.__call__
    monkeypatch.setattr(
        launcher.Launcher, "__call__", lambda self, *a: (names.append(self.name), call(self, *a))
    )
    return names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "k", "experts", "rank", "format"),
    [
        (1, 24, 64, 2, 4, "nf4"), (70, 70, 200, 3, 5, "int8"), (33, 37, 104, 4, 16, "fp4"),
        (40, 130, 128, 1, 1, "int4"), (20, 33, 72, 0, 4, "nf4"),
    ],
    ids=["a token", "R=15", "R=64", "R=1", "no experts"],
)  # fmt: skip
def test_against_float64(m, n, k, experts, rank, format, dtype, device, launched):
    case = make_case(m, m, n, k, experts, rank, format=format, dtype=dtype, device=device)
    y = forward(case.x, case.weight, *case.experts, case.bias, case.scaling, route=WAY)
    assert launched[-1] == "persistent"
    assert_close(y, truth(case)[0], TOLERANCE[dtype], "y", truth(case, absolute=True)[0])


@pytest.mark.parametrize("top_k", [None, 2])
def test_gates_of_a_router(top_k, device, launched):
    case = make_case(1, 40, 40, 128, 4, 4, dtype=torch.float16, bias=False, device=device)
    router, routing = make_router(case, 2, top_k, 0.5), (top_k, 0.5)
    given = (case.x, case.weight, case.lora_a, case.lora_b, router, None, case.scaling)
    y = forward(*given, routing=routing, route=WAY)
    assert launched == ["project", "dequantize", "persistent"]
    expected = routed_cases.truth(case, router, *routing)[0]
    size = routed_cases.truth(case, router, *routing, absolute=True)[0]
    assert_close(y, expected, 2 * TOLERANCE[torch.float16], "y", size)


def test_where_descriptors_do_not_reach_pointers_do(device):
    def loads(way=WAY, capability="", **change):
        case = make_case(3, 9, 24, change.pop("k", 64), 2, change.pop("rank", 4), **change)
        case.x = laid_out(case.x, layout)
        given = (case.weight, *case.experts, None, case.speakers, None)
        with pretending(capability, 3):
            facts = facts_of(case.x, *given, route=way)
            assert forward_plan(facts, False).route == way.route
            return facts.config("forward").loads, facts.config("backward").loads

    layout, half = "whole", {"dtype": torch.float16}
    assert loads(**half) == loads(**half, capability="sm_90") == ("descriptors", "pointers")
    for change in (
        {**half, "capability": "sm_89"}, {"dtype": torch.float32}, {**half, "k": 68},
        {**half, "speakers": 2}, {**half, "rank": 33}, {**half, "way": replace(WAY, route="fused")},
    ):  # fmt: skip
        assert loads(**change) == ("pointers", "pointers"), change
    layout = "offset"
    assert loads(**half)[0] == "pointers"
