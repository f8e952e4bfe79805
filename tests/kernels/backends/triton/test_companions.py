"""Layers that read the same x: one launch, the bits of three, nothing kept that is not asked for.

Launches are counted by name in Triton's interpreter; elsewhere every layer goes its own way.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from saml_kernels import SAMLConfig, SAMLLinear
from saml_kernels.backends import registry
from saml_kernels.backends.cpu import backend as cpu
from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton import launcher

CONFIG = SAMLConfig(num_experts=3, rank=4)


def attention(config=CONFIG, width=64, biases=(True, False, True)):
    torch.manual_seed(0)
    layers = [SAMLLinear.from_linear(nn.Linear(width, width, b), config) for b in biases]
    for layer in layers:
        nn.init.normal_(layer.lora_b)
        layer.requires_grad_(False)
    return layers


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that start."""
    if backend.why_unavailable():
        pytest.skip(backend.why_unavailable())
    monkeypatch.setitem(registry.PREFERRED, "cpu", "triton")
    monkeypatch.setattr(cpu, "forward_prepared", lambda *arguments: None)
    names, real = [], launcher.Launcher.__call__

    def noting(self, *arguments):
        names.append(self.name)
        real(self, *arguments)

    monkeypatch.setattr(launcher.Launcher, "__call__", noting)
    return names


def warm(layers, x):
    """What prepares each by itself, and the answers."""
    with torch.no_grad():
        return [layer(x) for layer in layers]


@pytest.mark.parametrize(
    ("mode", "top_k", "order"),
    [(torch.no_grad, None, (0, 1, 2)), (torch.inference_mode, 2, (1, 2, 0))],
    ids=["as transformers calls them", "as the greedy decoder does"],
)
def test_one_launch_and_the_same_bits(mode, top_k, order, launches):
    layers = attention(SAMLConfig(num_experts=3, rank=4, top_k=top_k))
    x = torch.randn(2, 3, 64)
    alone = warm(layers, x)
    assert SAMLLinear.together(layers)
    launches.clear()
    for _ in range(2):  # for another x too
        with mode():
            found = {i: layers[i](x) for i in order}
        assert all(torch.equal(found[i], alone[i]) for i in order)
        x = x.clone()
    assert launches == ["single"] * 2


def test_a_base_without_experts(launches):
    layers = attention(SAMLConfig(num_experts=0), biases=(False, False))
    x = torch.randn(1, 1, 64)
    alone = warm(layers, x)
    assert SAMLLinear.together(layers)
    launches.clear()
    assert all(map(torch.equal, warm(layers, x), alone)) and launches == ["single"]


def test_a_written_x_is_another(launches):
    layers = attention()
    x = torch.randn(1, 3, 64)
    warm(layers, x)
    SAMLLinear.together(layers)
    with torch.no_grad():
        layers[0](x)
        x.add_(1)
        found = layers[1](x)
    layers[1].companions = None
    assert torch.equal(found, warm(layers[1:2], x)[0])


def test_learning_goes_its_own_way(launches):
    layers = attention()
    x = torch.randn(1, 3, 64)
    warm(layers, x)
    SAMLLinear.together(layers)
    launches.clear()
    leaf = x.clone().requires_grad_()
    sum(layer(leaf).sum() for layer in layers).backward()
    assert leaf.grad is not None and launches == ["single"] * 3 + ["backward"] * 3


def test_many_rows_go_their_own_way(launches):
    layers = attention()
    x = torch.randn(1, 300, 64)
    warm(layers, x)
    SAMLLinear.together(layers)
    launches.clear()
    warm(layers, x)
    assert len(launches) >= 3


def test_those_that_part_ways_are_let_go(launches):
    layers = attention(SAMLConfig(num_experts=0), biases=(True, True))
    SAMLLinear.together(layers)
    for _ in range(4):
        for layer in layers:
            warm([layer], torch.randn(1, 1, 64))
    assert all(layer.companions is None for layer in layers)


def test_copies_are_on_their_own():
    layers = attention()
    assert SAMLLinear.together(layers)
    for other in (copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))):
        assert other.companions is None
    assert list(layers[0].state_dict()) == list(attention()[0].state_dict())


def test_what_differs_cannot():
    layers = attention()
    wide = attention(width=128)
    assert not SAMLLinear.together([layers[0], wide[0]])
    assert not SAMLLinear.together([layers[0]]) and not SAMLLinear.together(layers[:1] * 2)
    assert not SAMLLinear.together(layers + attention()) and layers[0].companions is None


def test_no_layer_keeps_another(launches):
    layers = attention()
    x = torch.randn(1, 1, 64)
    warm(layers, x)
    SAMLLinear.together(layers)
    warm(layers, x)
    gone = [weakref.ref(layer.weight.codes) for layer in layers]
    gc.collect()
    gc.disable()
    try:
        del layers[1]
        assert gone[1]() is None and gone[0]() is not None
    finally:
        gc.enable()
    assert layers[0](x).shape == (1, 1, 64)
