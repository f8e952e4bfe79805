"""Layers that `apply_saml` may not replace: preserved, left alone, or refused, and named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from synthetic import small_whisper
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from saml_kernels import SAMLConfig, SAMLEmbedding, SAMLError, SAMLLinear
from saml_kernels.layers.conv import QuantizedConv1d, QuantizedConv2d, SAMLPointwiseConv1d
from saml_kernels.layers.embedding import TiedHead
from saml_models.compress.apply import CompressionReport, apply_saml

# Eight bits: what is left of the difference is rounding, and whatever is wrong stands out.
EIGHT = SAMLConfig(num_experts=0, format="int8", block_size=32)


def treated(model: nn.Module, config: SAMLConfig = EIGHT) -> tuple[nn.Module, CompressionReport]:
    twin = copy.deepcopy(model).eval()
    return twin, apply_saml(twin, config)


@torch.no_grad()
def close(model: nn.Module, twin: nn.Module, *inputs: Any) -> None:
    before, after = model.eval()(*inputs), twin(*inputs)
    before, after = (t[0] if isinstance(t, tuple) else t for t in (before, after))
    assert (after - before).norm() < 0.02 * before.norm()


def test_attention_with_its_own_matrices_is_left_alone() -> None:
    model = nn.MultiheadAttention(64, 2, batch_first=True)
    with pytest.raises(SAMLError, match=r"no layer that could be replaced.*out_proj"):
        apply_saml(model, EIGHT)
    assert model.in_proj_weight.requires_grad

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = model, nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    whole = Model()
    twin, report = treated(whole)
    assert report.replaced == {"SAMLLinear": 1}
    assert report.kept == {
        "attention": "MultiheadAttention",
        "attention.out_proj": "NonDynamicallyQuantizableLinear",
    }
    assert "attention.out_proj" in str(report) and "\n" not in str(report)
    close(whole, twin, torch.randn(2, 5, 64))


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_with_a_fused_path(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    twin, report = treated(model, SAMLConfig(num_experts=2, rank=2, expert_init="lora"))
    assert report.replaced == {"SAMLLinear": 4}
    plain, _ = treated(model)
    x = torch.randn(2, 5, 64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        seen = [m(x, src_key_padding_mask=padding)[~padding] for m in (model.eval(), plain)]
    assert (seen[0] - seen[1]).norm() < 0.02 * seen[0].norm()
    twin.train(training)
    twin(x).sum().backward()
    gradient = twin.layers[0].linear1.lora_b.grad  # the experts are heard: B has a gradient
    assert gradient is not None and gradient.abs().sum() > 0


def test_a_weight_that_is_read_by_another_is_refused_in_one_line() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.inner.weight)

    twin, _ = treated(Reader())
    with pytest.raises(SAMLError, match="linear: given a weight in low bits") as caught:
        twin(torch.randn(2, 64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_padding_of_convolutions(mode: Any, padding: Any, dilation: int) -> None:
    stride = 1 if padding == "same" else 2
    options = {"padding": padding, "padding_mode": mode, "dilation": dilation, "stride": stride}
    one = nn.Sequential(nn.Conv1d(32, 64, 3, **options))
    two = nn.Sequential(nn.Conv2d(32, 64, (3, 2), **options))
    for model, x, kind in (
        (one, torch.randn(2, 32, 20), QuantizedConv1d),
        (one, torch.randn(32, 20), QuantizedConv1d),
        (two, torch.randn(2, 32, 12, 9), QuantizedConv2d),
    ):
        twin, _ = treated(model)
        assert type(twin[0]) is kind
        close(model, twin, x)


@pytest.mark.parametrize("padding", [0, "same", "valid"])
def test_pointwise_convolutions_with_padding_in_words(padding: Any) -> None:
    model = nn.Sequential(nn.Conv1d(32, 64, 1, padding=padding, padding_mode="circular"))
    twin, _ = treated(model)
    assert isinstance(twin[0], SAMLPointwiseConv1d)
    close(model, twin, torch.randn(2, 32, 20))


def test_grouped_and_transposed_convolutions_stay() -> None:
    model = nn.Sequential(
        nn.Conv1d(32, 64, 3, groups=4), nn.Conv1d(64, 64, 3, groups=64), nn.Conv1d(64, 32, 3),
        nn.ConvTranspose1d(32, 32, 3), nn.Conv1d(32, 32, 1),
    )  # fmt: skip
    twin, report = treated(model)
    assert report.kept == {"0": "grouped", "1": "depthwise", "3": "ConvTranspose1d"}
    close(model, twin, torch.randn(2, 32, 20))


def test_recurrent_bilinear_and_bare_parameters_stay_and_are_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.pair = nn.LSTM(32, 32, proj_size=16), nn.Bilinear(16, 16, 32)
            self.bag, self.table = nn.EmbeddingBag(10, 32), nn.Parameter(torch.randn(32, 32))
            self.list, self.out = nn.ParameterList([torch.randn(32, 32)]), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.rnn(x)[0]
            return self.out(self.pair(y, y) @ self.table @ self.list[0])

    model = Model()
    twin, report = treated(model)
    assert report.replaced == {"SAMLLinear": 1}
    assert report.kept == {
        "Model": "Model", "rnn": "LSTM", "pair": "Bilinear", "bag": "EmbeddingBag",
        "list": "ParameterList",
    }  # fmt: skip
    close(model, twin, torch.randn(4, 2, 32))


def test_options_of_embeddings() -> None:
    model = nn.Sequential(nn.Embedding(50, 64, max_norm=1.0), nn.Linear(64, 50, bias=False))
    index = torch.tensor([[3, 7, 3]])
    twin, report = treated(model)
    assert report.kept == {"0": "max_norm"}
    assert (twin[0](index).norm(dim=-1) <= 1 + 1e-5).all()
    close(model, twin, index)
    for option in ("scale_grad_by_freq", "sparse"):  # of gradients, which a frozen table has not
        model = nn.Sequential(nn.Embedding(50, 64, padding_idx=3, **{option: True}))
        twin, report = treated(model)
        assert isinstance(twin[0], SAMLEmbedding) and not report.kept
        close(model, twin, index)
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            twin(torch.tensor([wrong]))


def test_a_head_tied_to_what_stays_stays_tied() -> None:
    model = nn.Sequential(nn.Embedding(50, 64, max_norm=1.0), nn.Linear(64, 50), nn.Linear(50, 8))
    model[1].weight = model[0].weight
    twin, report = treated(model)
    assert report.kept == {"0": "max_norm"}  # the weight is one and the same
    assert twin[1].weight is twin[0].weight and isinstance(twin[1], nn.Linear)
    close(model, twin, torch.tensor([[3, 7, 3]]))


def test_a_head_that_only_the_weight_ties_becomes_a_tied_head() -> None:
    model = nn.Sequential(nn.Linear(64, 50), nn.Embedding(50, 64), nn.Linear(50, 50))
    model[0].weight = nn.Parameter(model[1].weight.data)  # the memory, not the parameter
    head = copy.deepcopy(model[0])
    report = apply_saml(model, EIGHT)
    assert report.replaced == {"SAMLEmbedding": 1, "SAMLLinear": 1, "TiedHead": 1}
    assert isinstance(model[0], TiedHead) and model[0].weight is model[1].weight
    close(head, model[0], torch.randn(2, 64))


def test_a_layer_registered_twice_is_replaced_in_both_places() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.block = nn.Sequential(nn.ReLU(), self.first)
            self.again = nn.ModuleList([self.first, self.first])

        def forward(self, x: Tensor) -> Tensor:
            return self.again[1](self.block(self.first(x)))

    model = Model()
    twin, report = treated(model, SAMLConfig(num_experts=2, rank=2, expert_init="lora"))
    assert report.replaced == {"SAMLLinear": 1} and not report.kept
    assert isinstance(twin.first, SAMLLinear)
    assert twin.first is twin.block[1] is twin.again[0] is twin.again[1]
    twin, _ = treated(model)
    close(model, twin, torch.randn(3, 64))


def test_two_layers_with_one_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    twin, report = treated(model)
    assert report.replaced == {"SAMLLinear": 2}
    close(model, twin, torch.randn(3, 64))


def test_a_layer_that_something_else_holds_too_is_left_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(64, 64) for _ in range(3))
            self.order = [self.one]
            object.__setattr__(self, "unregistered", self.two)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.unregistered(self.order[0](x)))

    model = Model()
    twin, report = treated(model)
    assert report.kept == {"one": "held", "two": "held"}
    assert twin.order[0] is twin.one and twin.unregistered is twin.two
    close(model, twin, torch.randn(3, 64))


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 8), nn.Embedding(8, 8), nn.Conv1d(8, 8, 1), nn.Conv2d(8, 8, 1)]
)
def test_a_bare_layer_is_refused(layer: nn.Module) -> None:
    with pytest.raises(SAMLError, match=r"a single layer; use SAMLLinear\.from_linear"):
        apply_saml(layer, EIGHT)
    assert all(p.requires_grad for p in layer.parameters())


def test_a_model_with_nothing_to_replace_is_refused() -> None:
    for model, message in (
        (nn.Sequential(nn.ReLU()), "no weights"),
        (nn.Sequential(nn.GRU(8, 8)), r"1 GRU \(0\)"),
    ):
        with pytest.raises(SAMLError, match=message):
            apply_saml(model, EIGHT)
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "saml")


def test_subclasses_keep_their_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Causal(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (2, 0)))

    model = nn.Sequential(nn.Linear(32, 32), Doubled(32, 32), Causal(4, 32, 3))
    twin, report = treated(model)
    assert report.kept == {"1": "Doubled", "2": "Causal"}
    close(model, twin, torch.randn(4, 32))


def test_parametrised_weights_are_taken_as_they_are() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)
    twin, report = treated(model)
    assert report.replaced == {"SAMLLinear": 2} and not report.kept
    close(model, twin, torch.randn(3, 64))


def test_layers_with_hooks_are_left_alone() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    heard: list[int] = []
    model[0].register_forward_hook(lambda *_: heard.append(0))
    model[1].register_forward_pre_hook(lambda *_: heard.append(1))
    model[2].register_full_backward_hook(lambda *_: heard.append(2))
    prune.l1_unstructured(model[3], "weight", 0.5)
    forward = model[4].forward
    model[4].forward = lambda x: 2 * forward(x)
    report = apply_saml(model, EIGHT)
    assert report.kept == dict.fromkeys("01234", "hooks")
    model(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert heard == [1, 0, 2] or heard == [0, 1, 2]
    # The older weight_norm computes the weight in a hook: a stale copy would be the wrong one.
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[0])
    with torch.no_grad():
        model[0].weight_g.mul_(3)
    apply_saml(model, EIGHT)
    x = torch.randn(2, 64)
    normed = F.normalize(model[0].weight_v, dim=1) * model[0].weight_g
    torch.testing.assert_close(model[0](x), F.linear(x, normed, model[0].bias))


def test_models_with_peft_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = small_whisper()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SAMLError, match=r"q_proj: has a PEFT adapter; merge it first"):
        apply_saml(adapted, EIGHT)
    assert apply_saml(adapted.merge_and_unload(), EIGHT).replaced


def test_parameters_without_a_shape_are_refused() -> None:
    with pytest.raises(SAMLError, match=r"0\.weight: has no shape yet"):
        apply_saml(nn.Sequential(nn.LazyLinear(8)), EIGHT)


def test_layers_that_bitsandbytes_quantised_stay() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    four = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu")
    model = nn.Sequential(four, nn.Linear(64, 64))
    x = torch.randn(2, 64)
    before = model(x)
    report = apply_saml(model, EIGHT)
    assert report.kept == {"0": "Linear4bit"} and model[0] is four
    assert (model(x) - before).norm() < 0.02 * before.norm()


def test_integers_and_complex_numbers_are_not_rounded() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    model.table = nn.Parameter(torch.tensor([[2**24 + 1, 7]], dtype=torch.int32), False)
    model.phases = nn.Parameter(torch.tensor([[1 + 2j]]), False)
    report = apply_saml(model, EIGHT)
    assert model.table[0, 0] == 2**24 + 1 and model.phases[0, 0] == 1 + 2j
    assert report.kept == {"Sequential": "Sequential"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 32)).to(dtype)
    twin, _ = treated(model)
    index = torch.tensor([[3, 7, 3]])
    with torch.no_grad():
        assert twin(index).dtype == dtype
    close(model, twin, index)


def test_meta_weights_stay_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 50))
    report = apply_saml(model, EIGHT)
    assert report.replaced == {"SAMLEmbedding": 1, "SAMLLinear": 1}
    assert all(t.is_meta for t in model.state_dict().values())


def test_treating_a_model_without_linear_layers_twice_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    apply_saml(model, EIGHT)
    with pytest.raises(SAMLError, match="already has SAML layers"):
        apply_saml(model, EIGHT)
