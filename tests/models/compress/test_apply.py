"""`apply_saml`: what is replaced, what stays, and what the report says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from synthetic import small_whisper
from torch import nn

from saml_kernels import SAMLConfig, SAMLEmbedding, SAMLError, SAMLLinear
from saml_kernels.layers.conv import QuantizedConv1d, SAMLPointwiseConv1d
from saml_kernels.layers.embedding import TiedHead
from saml_models.compress.apply import apply_saml
from saml_models.compress.layers import compression_of, quantised_tensors

TABLE = "model.decoder.embed_tokens"
IDS = torch.tensor([[1, 5, 9, 7]])
MEL = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))


def kinds(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for module in model.modules():
        found[type(module).__name__] = found.get(type(module).__name__, 0) + 1
    return found


def test_tiny_en_has_no_full_precision_layer_left(tiny_en: Any) -> None:
    model = copy.deepcopy(tiny_en[0])
    report = apply_saml(model, SAMLConfig(num_experts=4, rank=4, expert_init="lora"))
    left = kinds(model)
    assert "Linear" not in left
    assert "Conv1d" not in left
    # 4 encoder layers of 6 and 4 decoder layers of 10.
    assert report.replaced == {
        "QuantizedConv1d": 2, "SAMLLinear": 64, "SAMLEmbedding": 1, "TiedHead": 1
    }  # fmt: skip
    assert isinstance(model.proj_out, TiedHead)
    assert model.proj_out._tied[0] is model.model.decoder.embed_tokens
    assert report.parameters == 37_760_256  # OpenAI's 37.2 M and the encoder's sinusoids
    assert report.full_bytes == 4 * report.parameters
    # Per layer of E = 4, r = 4: 16 (K + N) for A and B, 4 K for the router.
    widths = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, SAMLLinear)]
    assert report.trainable == sum(16 * (k + n) + 4 * k for k, n in widths)
    assert report.memory_bytes < report.full_bytes / 5
    assert "1 TiedHead" in str(report)
    assert "\n" not in str(report)


def test_projections_of_one_x_run_together() -> None:
    """In every attention; the cross-attention's queries read something else."""
    model = small_whisper()
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    own = [m.self_attn for m in model.modules() if hasattr(m, "self_attn")]
    cross = [m.encoder_attn for m in model.modules() if hasattr(m, "encoder_attn")]
    assert own and cross
    for attention in (*own, *cross):
        q, k, v, out = (getattr(attention, f"{n}_proj").companions for n in ("q", "k", "v", "out"))
        assert k is v is not None and out is None
        assert (q is None) == (attention in cross) and q in (None, k)


def test_only_experts_and_routers_are_trainable() -> None:
    model = small_whisper()
    report = apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(model.saml.experts())
    assert sum(p.numel() for p in model.saml.experts().values()) == report.trainable
    assert {n.rsplit(".", 1)[-1] for n in trainable} == {"lora_a", "lora_b", "weight"}


@torch.no_grad()
def test_int8_without_experts_is_close_and_the_head_stays_tied() -> None:
    model = small_whisper()
    before = model(input_features=MEL, decoder_input_ids=IDS).logits
    apply_saml(model, SAMLConfig(num_experts=0, format="int8"))
    after = model(input_features=MEL, decoder_input_ids=IDS).logits
    assert (before - after).norm() / before.norm() < 0.05
    table = model.model.decoder.embed_tokens.weight.dequantize()
    x = torch.randn(2, 64)
    torch.testing.assert_close(model.proj_out(x), x @ table.T, rtol=1e-4, atol=1e-4)
    assert not model.saml.experts()


@torch.no_grad()
def test_loftq_brings_the_model_closer_to_the_original() -> None:
    distances = []
    for config in (SAMLConfig(num_experts=0), SAMLConfig(num_experts=4, rank=8)):
        model = small_whisper()
        before = model(input_features=MEL, decoder_input_ids=IDS).logits
        apply_saml(model, config)
        distances.append((model(input_features=MEL, decoder_input_ids=IDS).logits - before).norm())
    assert distances[1] < distances[0]


def test_experts_on_attention_only() -> None:
    model = small_whisper()
    apply_saml(model, SAMLConfig(targets="attention", num_experts=2, rank=2))
    assert all("_proj." in name for name in model.saml.experts())
    assert isinstance(model.model.encoder.layers[0].fc1, SAMLLinear)


@pytest.mark.parametrize(("half", "layers"), [("encoder", 6), ("decoder", 10)])
def test_experts_in_one_half_only(half: Any, layers: int) -> None:
    model = small_whisper()
    apply_saml(model, SAMLConfig(targets=half, num_experts=2, rank=2))
    names = [name for name in model.saml.experts() if name.endswith("lora_b")]
    assert len(names) == layers and all(f".{half}." in name for name in names)
    assert len(model.saml.routers) == layers
    with pytest.raises(SAMLError, match=r"shared.*both halves"):
        SAMLConfig(targets=half, router="shared", mix="merged")
    with pytest.raises(SAMLError, match=rf"{half}.*Sequential has no such layers"):
        apply_saml(nn.Sequential(nn.Linear(64, 64)), SAMLConfig(targets=half, rank=2))


@torch.no_grad()
@pytest.mark.parametrize("router", ["token", "utterance", "speaker", "shared"])
def test_a_deep_copy_stands_on_its_own(router: Any) -> None:
    mix = "merged" if router == "shared" else "sum"
    model = small_whisper()
    apply_saml(model, SAMLConfig(router=router, mix=mix, num_experts=2, rank=2))
    for parameter in model.saml.experts().values():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    twin = copy.deepcopy(model)
    assert twin.saml.context is not model.saml.context
    assert twin.proj_out._tied[0] is twin.model.decoder.embed_tokens
    expected = model(input_features=MEL, decoder_input_ids=IDS).logits
    model(input_features=MEL.flip(-1), decoder_input_ids=IDS)
    for parameter in model.saml.experts().values():
        parameter.zero_()
    assert torch.equal(twin(input_features=MEL, decoder_input_ids=IDS).logits, expected)


@torch.no_grad()
def test_utterance_router_hears_the_clip_in_every_decoder_layer() -> None:
    model = small_whisper()
    apply_saml(model, SAMLConfig(router="utterance", num_experts=2, rank=2))
    for parameter in model.saml.experts().values():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    features = torch.cat((MEL, MEL.flip(-1)))
    together = model(input_features=features, decoder_input_ids=IDS.expand(2, -1)).logits
    alone = model(input_features=features[1:], decoder_input_ids=IDS).logits
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)
    kept = torch.ones(1, 1500, dtype=torch.bool)
    model.saml.context.mask = kept
    torch.testing.assert_close(
        model(input_features=features[1:], decoder_input_ids=IDS).logits, alone
    )


def test_an_untied_head_becomes_a_layer_of_its_own() -> None:
    model = small_whisper()
    model.proj_out.weight = nn.Parameter(torch.randn(300, 64))
    report = apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    assert isinstance(model.proj_out, SAMLLinear)
    assert len(model.proj_out.lora_a) == 0
    assert "TiedHead" not in report.replaced


def test_convolutions_of_a_conformer_block() -> None:
    block = nn.Sequential(
        nn.Conv1d(64, 128, 1),
        nn.Conv1d(128, 128, 3, groups=128, padding=1),
        nn.Conv1d(128, 64, 1, stride=2),
        nn.Linear(64, 64),
    )
    report = apply_saml(block, SAMLConfig(num_experts=2, rank=2))
    assert [type(m) for m in block] == [SAMLPointwiseConv1d, nn.Conv1d, QuantizedConv1d, SAMLLinear]
    assert block(torch.randn(2, 64, 128)).shape == (2, 64, 64)
    assert report.parameters > report.trainable > 0
    assert len(block.saml.experts()) == 6
    assert len(quantised_tensors(block)) == 3


def test_half_precision_model() -> None:
    model = small_whisper().to(torch.bfloat16)
    apply_saml(model, SAMLConfig.paper())
    out = model(input_features=MEL.bfloat16(), decoder_input_ids=IDS).logits
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


def test_refusals() -> None:
    model = small_whisper()
    with pytest.raises(SAMLError, match="no SAML layers"):
        compression_of(model)
    with pytest.raises(SAMLError, match="encoder and a decoder"):
        apply_saml(nn.Sequential(nn.Linear(64, 64)), SAMLConfig.paper())
    apply_saml(model, SAMLConfig(num_experts=0))
    with pytest.raises(SAMLError, match="already has SAML layers"):
        apply_saml(model, SAMLConfig())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_a_model_that_is_refused_is_left_as_it_was(value: float) -> None:
    model = small_whisper()
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.bias[3] = value
    with pytest.raises(SAMLError, match=r"fc2.bias: holds NaN"):
        apply_saml(model, SAMLConfig())
    assert "SAMLLinear" not in kinds(model)
    assert all(p.requires_grad for n, p in model.named_parameters() if "positions" not in n)


@pytest.mark.parametrize(
    ("path", "format", "reason"),
    [
        ("proj_out", "int8", r"proj_out: is a head .* its table, model\.decoder\.embed_tokens"),
        (TABLE, {"format": "nf4", "finer_rows": 3}, "finer rows come from a calibration"),
    ],
)
def test_formats_that_are_refused_change_nothing(path: str, format: Any, reason: str) -> None:
    model = small_whisper()
    learn = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SAMLError, match=reason):
        apply_saml(model, SAMLConfig(num_experts=2, rank=2), formats={path: format})
    assert [p.requires_grad for p in model.parameters()] == learn
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


def test_an_untied_head_has_a_format_of_its_own() -> None:
    model: Any = small_whisper()
    model.proj_out.weight = nn.Parameter(torch.randn(300, 64))
    apply_saml(model, SAMLConfig(num_experts=0), formats={"proj_out": "int8"})
    assert model.saml.formats() == {"proj_out": "int8"}


def test_embedding_is_replaced_once() -> None:
    model = small_whisper()
    apply_saml(model, SAMLConfig(num_experts=0))
    assert sum(isinstance(m, SAMLEmbedding) for m in model.modules()) == 1
    assert not [n for n in model.state_dict() if n.startswith("proj_out")]
