"""`SAMLLinear`, `SAMLEmbedding`, the tied head and the convolutions, each against its equation."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saml_kernels import SAMLConfig, SAMLEmbedding, SAMLError, SAMLLinear, quantize
from saml_kernels.layers.context import BatchContext
from saml_kernels.layers.conv import QuantizedConv1d, SAMLPointwiseConv1d
from saml_kernels.layers.embedding import FinerRows, TiedHead
from saml_kernels.quantization.tensor import FORMATS

K, N = 128, 96
COMBINATIONS = [
    (router, mix, top_k, init)
    for router, mix, top_k, init in product(
        ("token", "utterance", "speaker"), ("sum", "merged"), (None, 2), ("lora", "loftq")
    )
    if not (router == "token" and mix == "merged")
]


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(K, N, bias)


def random_experts(layer: SAMLLinear) -> SAMLLinear:
    """Experts and router as training could leave them."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in (layer.lora_a, layer.lora_b, *layer.router.parameters()):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return layer


def expected(layer: SAMLLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer's equation spelt out clip by clip, expert by expert: x [B, T, K]."""
    c = layer.config
    y = F.linear(x, layer.weight.dequantize(), layer.bias)
    router = layer.router.weight
    for clip in range(x.shape[0]):
        for t in range(x.shape[1]):
            seen = {"token": x[clip, t], "utterance": x[clip].mean(0)}.get(c.router)
            logits = router if seen is None else router @ seen
            gates = torch.softmax(logits / c.temperature, -1)
            if c.top_k:
                kept = gates >= gates.sort(descending=True).values[c.top_k - 1]
                gates = gates * kept / gates[kept].sum()
            a, b = layer.lora_a, layer.lora_b
            if c.mix == "merged":
                down = sum(g * a[e] for e, g in enumerate(gates))
                up = sum(g * b[e] for e, g in enumerate(gates))
                y[clip, t] += c.scaling * (up @ (down @ x[clip, t]))
            else:
                for e, g in enumerate(gates):
                    y[clip, t] += c.scaling * g * (b[e] @ (a[e] @ x[clip, t]))
    return y


@pytest.mark.parametrize(("router", "mix", "top_k", "init"), COMBINATIONS)
def test_every_combination_is_its_equation(router: Any, mix: Any, top_k: Any, init: Any) -> None:
    config = SAMLConfig(
        num_experts=4,
        rank=2,
        router=router,
        mix=mix,
        top_k=top_k,
        expert_init=init,
        temperature=0.7,
    )
    layer = random_experts(SAMLLinear.from_linear(linear(), config)).eval()
    x = torch.randn(2, 5, K)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
        single = layer(x[:1])
        torch.testing.assert_close(layer(x[0]), single[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x[:1].unsqueeze(1)), single.unsqueeze(1))
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if name == "bias":
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("mix", ["sum", "merged"])
def test_dropout_acts_on_the_experts_only_and_only_in_training(mix: Any) -> None:
    config = SAMLConfig(num_experts=4, rank=2, router="utterance", mix=mix, dropout=0.5)
    layer = random_experts(SAMLLinear.from_linear(linear(), config))
    quiet = random_experts(
        SAMLLinear.from_linear(
            linear(), SAMLConfig(num_experts=4, rank=2, router="utterance", mix=mix)
        )
    )
    x = torch.randn(2, 5, K)
    layer.eval()
    torch.testing.assert_close(layer(x), quiet(x))
    layer.train()
    one, other = layer(x), layer(x)
    assert not torch.equal(one, other)
    torch.manual_seed(11)
    again = layer(x)
    torch.manual_seed(11)
    assert torch.equal(layer(x), again)
    with torch.no_grad():
        layer.lora_b.zero_()
        base = F.linear(x, layer.weight.dequantize(), layer.bias)
        torch.testing.assert_close(layer(x), base, rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_mean() -> None:
    config = SAMLConfig(num_experts=2, rank=4, dropout=0.3)
    layer = random_experts(SAMLLinear.from_linear(linear(), config))
    x = torch.randn(1, 1, K)
    with torch.no_grad():
        quiet = layer.eval()(x)
        noisy = layer.train()(x.expand(4000, 1, K)).mean(0, keepdim=True)
    base = F.linear(x, layer.weight.dequantize(), layer.bias)
    assert (noisy - quiet).norm() < 0.15 * (quiet - base).norm()


@pytest.mark.parametrize(("mix", "router"), [("sum", "token"), ("merged", "utterance")])
@pytest.mark.parametrize("format", FORMATS)
def test_loftq_brings_the_layer_closer_to_the_original(mix: Any, router: Any, format: Any) -> None:
    source = linear()
    config = SAMLConfig(num_experts=4, rank=4, mix=mix, router=router, format=format)
    layer = SAMLLinear.from_linear(source, config).eval()
    plain = SAMLLinear.from_linear(source, SAMLConfig(num_experts=0, format=format))
    eye = torch.eye(K).unsqueeze(0)
    with torch.no_grad():
        wanted, quantised, repaired = (m(eye) for m in (source, plain, layer))
    assert (wanted - repaired).norm() < 0.95 * (wanted - quantised).norm()


def test_loftq_of_the_sum_is_the_best_of_its_rank() -> None:
    source = linear()
    layer = SAMLLinear.from_linear(source, SAMLConfig(num_experts=3, rank=5))
    error = source.weight - layer.weight.dequantize()
    added = layer.config.scaling / 3 * torch.einsum("enr,erk->nk", layer.lora_b, layer.lora_a)
    rest = torch.linalg.svdvals(error)[15:]
    torch.testing.assert_close((error - added).norm(), rest.norm(), rtol=1e-3, atol=1e-5)


def test_loftq_with_more_directions_than_the_weight_has() -> None:
    narrow = nn.Linear(64, 4)
    layer = SAMLLinear.from_linear(narrow, SAMLConfig(num_experts=4, rank=4)).eval()
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), narrow(x), rtol=1e-3, atol=1e-4)


def test_lora_start_changes_nothing() -> None:
    source = linear()
    config = SAMLConfig(num_experts=4, rank=4, expert_init="lora")
    layer = SAMLLinear.from_linear(source, config).eval()
    plain = SAMLLinear.from_linear(source, SAMLConfig(num_experts=0))
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), plain(x))


def test_the_original_is_left_alone() -> None:
    source = linear()
    before = copy.deepcopy(source.state_dict())
    layer = SAMLLinear.from_linear(source, SAMLConfig())
    with torch.no_grad():
        layer.lora_a.add_(1)
    layer(torch.randn(2, K)).sum().backward()
    assert all(torch.equal(before[n], t) for n, t in source.state_dict().items())
    assert source.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    layer = random_experts(SAMLLinear.from_linear(linear(), SAMLConfig(num_experts=2, rank=2)))
    x = torch.randn(4, K)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - layer(x)).norm() / layer(x).norm() < 0.03
    half = copy.deepcopy(layer).half()
    assert half(x.half()).dtype == torch.float16
    assert half.weight.codes.dtype == torch.uint8


def test_state_dict_round_trip_and_copies() -> None:
    config = SAMLConfig(num_experts=2, rank=2)
    layer = random_experts(SAMLLinear.from_linear(linear(), config))
    torch.manual_seed(9)
    other = SAMLLinear.from_linear(nn.Linear(K, N), config)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, K)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "format=nf4" in repr(layer)


@pytest.mark.parametrize("router", ["token", "utterance", "speaker"])
def test_compiles_in_one_graph(router: Any) -> None:
    config = SAMLConfig(num_experts=4, rank=2, router=router, top_k=2)
    layer = random_experts(SAMLLinear.from_linear(linear(), config))
    x = torch.randn(2, 3, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_autocast() -> None:
    layer = random_experts(SAMLLinear.from_linear(linear(), SAMLConfig(num_experts=2, rank=2)))
    x = torch.randn(4, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - layer(x)).norm() / layer(x).norm() < 0.03
    y.float().sum().backward()
    assert layer.lora_a.grad.dtype == torch.float32


def test_nan_weights_are_refused() -> None:
    broken = linear()
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(SAMLError, match="NaN"):
        SAMLLinear.from_linear(broken, SAMLConfig())


def test_pointwise_convolution_is_a_linear_layer() -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(K, N, 1)
    layer = SAMLPointwiseConv1d.from_conv(conv, SAMLConfig(num_experts=4, rank=4, format="int8"))
    x = torch.randn(2, K, 7)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-2, atol=1e-2)
    assert layer(x).shape == (2, N, 7)
    assert conv.weight.requires_grad
    assert conv.bias.requires_grad


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}])
def test_quantised_convolution(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(20, 30, 3, **options)
    layer = QuantizedConv1d(conv, SAMLConfig())
    same = copy.deepcopy(conv)
    with torch.no_grad():
        same.weight.copy_(layer.weight.dequantize())
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(layer(x), same(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("format", FORMATS)
def test_embedding_and_its_tied_head(width: int, format: Any) -> None:
    torch.manual_seed(0)
    source = nn.Embedding(50, width)
    layer = SAMLEmbedding.from_embedding(source, SAMLConfig(format=format))
    table = layer.weight.dequantize()
    index = torch.tensor([[0, 49, 7], [7, 7, 1]])
    assert torch.equal(layer(index), table[index])
    head = TiedHead(layer)
    x = torch.randn(2, 3, width)
    torch.testing.assert_close(head(x), x @ table.T, rtol=1e-4, atol=1e-4)
    assert not list(head.parameters())
    assert not head.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_finer_rows_are_added_to_what_is_looked_up_and_to_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    source = nn.Embedding(50, 64)
    layer = SAMLEmbedding.from_embedding(source, SAMLConfig()).to(dtype)
    coarse = layer.weight.dequantize()
    rows = torch.tensor([0, 3, 7, 49])
    more = quantize(source.weight.detach()[rows] - coarse[rows])
    layer.finer = FinerRows(rows.int(), more).check(layer.weight)
    table = coarse.clone()
    table[rows] += more.dequantize()
    missed = (table - source.weight)[rows].norm(), (coarse - source.weight)[rows].norm()
    assert missed[0] < 0.2 * missed[1]

    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float16 else {}
    ids = torch.tensor([[0, 1, 7, 8], [49, 3, 2, 49]])
    torch.testing.assert_close(layer(ids), table[ids].to(dtype), **tolerance)
    x = torch.randn(2, 3, 64).to(dtype).requires_grad_()
    logits = TiedHead(layer)(x)
    expected = x.detach().float() @ table.T
    torch.testing.assert_close(logits, expected.to(dtype), rtol=2e-3, atol=2e-2)
    logits.float().square().sum().backward()
    assert x.grad is not None
    found, wanted = x.grad.float(), 2 * expected @ table
    assert (found - wanted).norm() < 2e-3 * wanted.norm()
    with pytest.raises(IndexError):
        layer(torch.tensor([50]))


@pytest.mark.parametrize(
    ("rows", "shape"),
    [((3, 1), (2, 64)), ((1, 1), (2, 64)), ((-1, 2), (2, 64)), ((1, 50), (2, 64)), ((1,), (2, 64)),
     ((1, 2), (2, 32))],
)  # fmt: skip
def test_finer_rows_of_no_such_table_are_refused(
    rows: tuple[int, ...], shape: tuple[int, int]
) -> None:
    layer = SAMLEmbedding.from_embedding(nn.Embedding(50, 64), SAMLConfig())
    finer = FinerRows(torch.tensor(rows, dtype=torch.int32), quantize(torch.randn(shape)))
    with pytest.raises(SAMLError, match=r"here: .* expected rising rows of a table \(50, 64\)"):
        finer.check(layer.weight, "here")
    for count in (0, 51, "many"):
        with pytest.raises(SAMLError, match="expected 1 to 50"):
            FinerRows.empty(count, layer.weight)  # type: ignore[arg-type]


def test_embedding_gives_the_dtype_the_model_computes_in() -> None:
    layer = SAMLEmbedding.from_embedding(nn.Embedding(50, 64), SAMLConfig())
    index = torch.tensor([3])
    assert layer(index).dtype == torch.float32
    assert layer.half()(index).dtype == torch.float16
    assert layer.to(torch.bfloat16)(index).dtype == torch.bfloat16
    assert "compute" not in layer.state_dict()


@pytest.mark.parametrize(
    "values",
    [
        {"num_experts": -1},
        {"rank": 0},
        {"top_k": 0},
        {"top_k": 5},
        {"dropout": 1.0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"alpha": float("inf")},
        {"router": "expert"},
        {"mix": "product"},
        {"mix": "merged", "router": "token"},
        {"expert_init": "zero"},
        {"expert_format": "int2"},
        {"targets": "none"},
    ],
)
def test_configuration_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(SAMLError, match=next(iter(values))):
        SAMLConfig(**values)


def test_configuration_to_json_and_back() -> None:
    for config in (SAMLConfig(), SAMLConfig(top_k=2, alpha=4), SAMLConfig.paper()):
        assert SAMLConfig.from_dict(config.to_dict()) == config
    for values in ({"ranks": 1}, {"rank": "8"}, {"rank": True}, {"double_quant": 1}, {"rank": 2.0}):
        with pytest.raises(SAMLError, match=r"rank|double_quant"):
            SAMLConfig.from_dict(values)


def test_layers_of_a_model_share_their_routing() -> None:
    context = BatchContext()
    layers = [
        SAMLLinear.from_linear(linear(), SAMLConfig(balance=0.1), context).train() for _ in range(2)
    ]
    for layer in layers:
        layer(torch.randn(2, 5, K))
    assert len(context.balance) == 2
    assert context.balance_loss() is not None
    assert context.balance_loss() is None


def test_experts_can_start_at_the_error_of_the_output() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 32)
    x = torch.randn(4096, 12) @ torch.randn(12, 128) + 0.05 * torch.randn(4096, 128)
    config = SAMLConfig(num_experts=2, rank=3)
    wanted, errors = linear(x), {}
    for name, moment in {"weight": None, "output": x.T @ x / len(x)}.items():
        layer = SAMLLinear.from_linear(linear, config)
        layer.start_at_quantisation_error(linear.weight, moment)
        errors[name] = float((layer(x) - wanted).detach().square().mean())
    # Rank 6 of the inputs' 12 directions: the best that any six can do, to a per cent.
    base = SAMLLinear.from_linear(linear, SAMLConfig(num_experts=0))
    left = torch.linalg.svdvals((base(x) - wanted).detach())[6:].square().sum() / wanted.numel()
    assert errors["output"] < 0.5 * errors["weight"]
    assert errors["output"] == pytest.approx(float(left), rel=0.05)
