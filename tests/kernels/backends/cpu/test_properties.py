"""The CPU backend has the properties of the Triton kernels, on their cases (triton/cases.py)."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, assert_close, check_answers, draw_case, make_case, many, truth
from hypothesis import given
from hypothesis import strategies as st
from routed_cases import check_answers as check_routed
from routed_cases import make_router
from routed_cases import truth as routed_truth
from torch import Tensor

from saml_kernels import (
    SAMLConfig,
    SAMLError,
    SAMLLinear,
    quantize,
    saml_linear,
    saml_linear_routed,
)
from saml_kernels.backends.cpu import native

pytestmark = pytest.mark.usefixtures("poisoned")
shapes = pytest.mark.parametrize("m", [1, 2, 3, 5, 7, 8, 9, 17, 24, 25, 130])
only_native = pytest.mark.parametrize("way", native.LEVELS, indirect=True)


def given_gates(case: Case) -> list[Tensor]:
    """The output without gradients (one call to C), which must be that with them; gradients."""
    leaves = [t.clone().requires_grad_() for t in (case.x, *case.experts)]
    x, *experts = leaves
    rest: tuple[Any, ...] = (case.bias, case.scaling, "cpu", case.speakers)
    y = saml_linear(x, case.weight, *experts, *rest)
    y.backward(case.dy)
    with torch.no_grad():
        plain = saml_linear(case.x, case.weight, *case.experts, *rest)
    check_answers(case, [plain, *(t.grad for t in leaves)])
    return [y.detach(), *(t.grad for t in leaves)]


def routed(case: Case, router: Tensor, top_k: int | None, temperature: float) -> None:
    leaves = [t.clone().requires_grad_() for t in (case.x, case.lora_a, case.lora_b, router)]
    x, a, b, v = leaves
    rest: tuple[Any, ...] = (case.bias, case.scaling, top_k, temperature, "cpu", case.speakers)
    saml_linear_routed(x, case.weight, a, b, v, *rest).backward(case.dy)
    with torch.no_grad():
        y = saml_linear_routed(case.x, case.weight, case.lora_a, case.lora_b, router, *rest)
    check_routed(case, router, top_k, temperature, [y, *(t.grad for t in leaves)])


@many
@given(data=st.data())
def test_random_shapes(way, data):
    case = draw_case(data.draw)
    check_answers(case, given_gates(case))


@many
@given(data=st.data())
def test_random_routed_shapes(way, data):
    case = draw_case(data.draw)
    top_k = data.draw(st.sampled_from((None, 1, 2)), "top_k")
    top_k = None if top_k is None else min(top_k, case.lora_a.shape[-3])
    temperature = data.draw(st.sampled_from((1.0, 0.5, 2.0)), "temperature")
    router = make_router(case, data.draw(st.integers(0, 2**32), "router"), top_k, temperature)
    routed(case, router, top_k, temperature)


@shapes
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_whisper_widths(way, m, format):
    """Every way of working: codes in registers, rows decoded to scratch, more than one slab."""
    case = make_case(m, m, 70, 1536, 4, 8, format=format)
    check_answers(case, given_gates(case))
    routed(case, make_router(case, m, 2, 1.0), 2, 1.0)


@pytest.mark.parametrize("needs", [(i & 1 > 0, i & 2 > 0, i & 4 > 0, i & 8 > 0) for i in range(16)])
def test_only_what_is_wanted(way, needs):
    from saml_kernels.backends.cpu import backend as cpu

    case = make_case(5, 8, 32, 64, 2, 3)
    grads = cpu.backward(case.dy, case.x, case.weight, *case.experts, case.scaling, needs)
    for grad, need, expected in zip(grads, needs, truth(case)[1:], strict=True):
        assert (grad is not None) == need
        if need:
            assert_close(grad, expected, 2e-6, "gradient")


def test_equal_logits_keep_the_first(way):
    case = make_case(6, 4, 32, 64, 4, 3)
    arguments = (case.weight, case.lora_a, case.lora_b)
    with torch.no_grad():
        y = saml_linear_routed(case.x, *arguments, torch.zeros(4, 64), case.bias, 0.75, 2)
        gates = torch.tensor([0.5, 0.5, 0.0, 0.0])
        expected = saml_linear(case.x, *arguments, gates, case.bias, 0.75)
    torch.testing.assert_close(y, expected)


def test_experts_nobody_chose_are_not_read(way):
    case = make_case(3, 4, 64, 128, 4, 4)
    case.gates[:, 2] = 0
    if native.serves(case.weight):
        case.lora_a[2] = case.lora_b[2] = float("nan")
    with torch.no_grad():
        y = saml_linear(case.x, case.weight, *case.experts, case.bias, case.scaling)
    case.lora_a[2] = case.lora_b[2] = 0
    assert_close(y, truth(case)[0], 1e-6, "y")


@only_native
def test_a_layer_seen_before_is_looked_at_again(way):
    """Its description is made once; other tensors, sizes or settings are noticed."""
    case = make_case(8, 3, 32, 128, 2, 4)
    router = make_router(case, 9, None, 1.0)
    a, b = torch.nn.Parameter(case.lora_a), torch.nn.Parameter(case.lora_b)

    def run(weight=case.weight, top_k=None):
        with torch.no_grad():
            return saml_linear_routed(case.x, weight, a, b, router, case.bias, 0.75, top_k)

    first, described = run(), case.weight.native
    if not native.serves(case.weight):
        pytest.skip(f"{way} serves no products")
    assert described is not None
    assert torch.equal(run(), first) and case.weight.native is described
    assert not torch.equal(run(top_k=1), first)
    with torch.no_grad():
        a.mul_(2)  # in place: the same memory
        assert not torch.equal(run(), first)
        a.div_(2)
    a.data = a.data * 2  # other memory under the same name
    case.lora_a = a.data
    assert_close(run(), routed_truth(case, router, None, 1.0)[0], 4e-6, "y")
    for copied in (copy.deepcopy(case.weight), pickle.loads(pickle.dumps(case.weight))):
        assert copied.native is None and torch.equal(run(copied), run())
    with pytest.raises(SAMLError, match="lora_b"):
        saml_linear_routed(case.x, case.weight, a, b[:, :31], router, case.bias)


@only_native
def test_one_token_of_a_layer_is_one_call(way, monkeypatch):
    """Nothing but `quick` runs for a layer in decoding; with gradients it is never asked."""
    layer = SAMLLinear.from_linear(torch.nn.Linear(128, 64), SAMLConfig(rank=2))
    x = torch.randn(2, 1, 128)
    expected = layer(x).detach()
    with torch.inference_mode():
        layer(x)
        if not native.serves(layer.weight):
            pytest.skip(f"{way} serves no products")
        monkeypatch.setattr("saml_kernels.ops.call.check", None)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x.double().float()[0]), expected[0])


def _closes_an_expert(layer):
    layer.router.offset = torch.tensor([0.0, -torch.inf])


def _moves_the_router(layer):
    layer.router.weight.data = layer.router.weight.data + torch.eye(2, 128)


def _replaces_an_expert(layer):
    layer.lora_b = torch.nn.Parameter(layer.lora_b.detach() * 2)


def _asks_for_one_expert(layer):
    layer.config = layer.router.config = replace(layer.config, top_k=1)


def _loads_another_weight(layer):
    layer.weight = quantize(torch.randn(64, 128))


@only_native
@pytest.mark.parametrize(
    "change",
    [_closes_an_expert, _moves_the_router, _replaces_an_expert, _asks_for_one_expert,
     _loads_another_weight],
)  # fmt: skip
def test_a_change_to_a_layer_is_noticed(way, change):
    """A layer that answers by its description gives what `saml_linear` gives after a change."""
    torch.manual_seed(0)
    layer = SAMLLinear.from_linear(torch.nn.Linear(128, 64), SAMLConfig(num_experts=2, rank=2))
    torch.nn.init.normal_(layer.lora_b)
    torch.nn.init.normal_(layer.router.weight, std=0.05)
    x = torch.randn(1, 1, 128)
    with torch.inference_mode():
        before = layer(x)
        assert torch.equal(layer(x), before)
    change(layer)
    with torch.inference_mode():
        after = layer(x)
        expected = saml_linear(
            x, layer.weight, layer.lora_a, layer.lora_b, layer.router(x), layer.bias,
            layer.config.scaling, "reference",
        )  # fmt: skip
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)


@only_native
def test_a_layer_without_experts_and_one_that_drops_out(way):
    """Neither has gates that its description could make; the second not while it is trained."""
    linear = torch.nn.Linear(128, 64, bias=False)
    plain = SAMLLinear.from_linear(linear, SAMLConfig(num_experts=0))
    dropping = SAMLLinear.from_linear(torch.nn.Linear(128, 64), SAMLConfig(rank=2, dropout=0.5))
    torch.nn.init.normal_(dropping.lora_b)
    x = torch.randn(2, 128)
    with torch.inference_mode():
        for _ in range(2):
            expected = x @ plain.weight.dequantize().T
            torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)
        same = dropping.eval()(x)
        assert torch.equal(dropping(x), same)
        assert not torch.allclose(dropping.train()(x), same, rtol=1e-3, atol=1e-3)
