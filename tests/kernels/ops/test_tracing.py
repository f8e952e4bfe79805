"""What looks at a layer instead of running it: the right value, or a refusal in one line."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from saml_kernels import SAMLConfig, SAMLEmbedding, SAMLError, SAMLLinear
from saml_kernels.layers.conv import QuantizedConv1d, SAMLPointwiseConv1d
from saml_kernels.layers.embedding import TiedHead

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

ROUTERS = ["token", "utterance", "speaker"]
ROWS = [1, 4, 300]  # one pass over the packed weight, and scratch with torch's own product


def layer(router: Any = "token", experts: int = 2) -> SAMLLinear:
    torch.manual_seed(0)
    config = SAMLConfig(num_experts=experts, rank=2, router=router, expert_init="lora")
    made = SAMLLinear.from_linear(nn.Linear(128, 256), config).eval()
    for parameter in made.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return made


def tokens(seed: int, rows: int = 4) -> Tensor:
    return torch.randn(2, rows, 128, generator=torch.Generator().manual_seed(seed))


def right_or_refused(act: Callable[[], Any], expected: Any) -> None:
    try:
        found = act()
    except SAMLError as error:
        assert "\n" not in str(error)
        return
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def traced(module: nn.Module, example: Tensor, other: Tensor) -> Tensor:
    """`other` through a traced module that was saved and loaded."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, example, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)(other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("router", ROUTERS)
def test_traced_by_torchscript(router: Any, rows: int, mode: Any) -> None:
    module = layer(router)
    with mode():
        expected = module(tokens(2, rows))
        right_or_refused(lambda: traced(module, tokens(1, rows), tokens(2, rows)), expected)


@pytest.mark.parametrize("name", ["without experts", "convolution", "pointwise", "table", "head"])
def test_other_layers_traced_by_torchscript(name: str) -> None:
    config = SAMLConfig(num_experts=2, rank=2, expert_init="lora")
    table = SAMLEmbedding.from_embedding(nn.Embedding(50, 128), config)
    module: nn.Module = {
        "without experts": layer(experts=0),
        "convolution": QuantizedConv1d(nn.Conv1d(128, 64, 3), config),
        "pointwise": SAMLPointwiseConv1d.from_conv(nn.Conv1d(128, 64, 1), config),
        "table": table,
        "head": TiedHead(table, torch.ones(50)),
    }[name]
    examples = tokens(1), tokens(2)
    if name in ("convolution", "pointwise"):
        examples = tuple(x.transpose(1, 2).contiguous() for x in examples)  # type: ignore
    if name == "table":
        examples = torch.tensor([1, 2]), torch.tensor([49, 0])
    with torch.no_grad():
        expected = module(examples[1])
        right_or_refused(lambda: traced(module, *examples), expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_forward_mode_derivatives(router: Any) -> None:
    """A tangent that is lost is a wrong derivative."""
    module, x, v = layer(router).double(), tokens(1).double(), tokens(2).double()
    # By differences: y is linear in x but for the router's gates.
    step = 1e-5
    expected = (module(x + step * v) - module(x - step * v)).detach() / (2 * step)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            right_or_refused(lambda: torch.func.jvp(module, (x,), (v,))[1].detach(), expected)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, v)
                right_or_refused(
                    lambda: forward_ad.unpack_dual(module(dual)).tangent,  # noqa: B023
                    expected,
                )


def test_functional_gradients() -> None:
    module, x = layer(), tokens(1)
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, values, (x,)).square().sum()

    module(x).square().sum().backward()
    right_or_refused(lambda: torch.func.grad(loss)(parameters)["lora_b"], module.lora_b.grad)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_parameters_by_name(router: Any, grad: bool) -> None:
    """The layer that the CPU backend has described is not mistaken for the one that is meant."""
    module, x = layer(router), tokens(1)
    values = {n: p.detach() for n, p in module.named_parameters()}
    values["lora_b"] = torch.zeros_like(values["lora_b"])
    with torch.set_grad_enabled(grad):
        before = module(x)
        found = torch.func.functional_call(module, values, (x,))
        base = nn.functional.linear(x, module.weight.dequantize(), module.bias)
        torch.testing.assert_close(found, base, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module(x), before)


def test_vmap_is_refused() -> None:
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(SAMLError, match="vmap"):
            torch.func.vmap(layer())(tokens(1))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_graphs_hold_the_operator(router: Any, grad: bool) -> None:
    module, x, other = layer(router), tokens(1), tokens(2)
    with torch.set_grad_enabled(grad):
        expected = module(other)
        exported = export(module, (x,)).module()
        torch.testing.assert_close(exported(other), expected, rtol=1e-4, atol=1e-4)
        free = export(module, (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},)).module()
        more = torch.cat((other, other))
        torch.testing.assert_close(free(more), module(more), rtol=1e-4, atol=1e-4)
        graph = make_fx(lambda t: module(t))(x)
        assert any("saml_kernels.linear" in str(node.target) for node in graph.graph.nodes)
        torch.testing.assert_close(graph(other), expected, rtol=1e-4, atol=1e-4)


class _Heard(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


class _Marked(Tensor):
    """A subclass that does nothing."""


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
def test_modes_and_subclasses(router: Any) -> None:
    module, x = layer(router), tokens(1)
    expected = module(x)
    with _Heard() as heard:
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert "saml_kernels.linear.default" in heard.operators
    marked = module(x.as_subclass(_Marked))
    assert type(marked) is _Marked
    torch.testing.assert_close(marked.as_subclass(Tensor), expected, rtol=1e-4, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert module(fake.from_tensor(x)).shape == expected.shape
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected)
    empty = layer(router).to("meta")
    assert empty(x.to("meta")).is_meta
    for wrong in (lambda: empty(x), lambda: module(x.to("meta"))):
        with pytest.raises(SAMLError, match=r"on cpu|on meta"):
            wrong()


@torch.no_grad()
def test_a_head_and_a_table_on_meta() -> None:
    table = SAMLEmbedding.from_embedding(nn.Embedding(50, 128), SAMLConfig(num_experts=0))
    head = TiedHead(table)
    head(tokens(1))
    table.to("meta")
    with pytest.raises(SAMLError, match="weight: on meta"):
        head(tokens(1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    module, found = layer(), []
    for run in (lambda x: module(x), lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        module.zero_grad()
        x = tokens(1).requires_grad_()
        run(x).square().sum().backward()
        found.append((x.grad, module.lora_b.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
