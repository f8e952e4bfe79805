"""`SAMLConfig.paper()` against the authors' equations, transcribed here independently.

Source: whisper/model_moe.py of github.com/qmgzhao/SAML, in our own words and one equation a line.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from synthetic import small_whisper
from torch import Tensor, nn

from saml_kernels import SAMLConfig, SAMLLinear
from saml_models.compress.apply import apply_saml
from saml_models.models.whisper.windows import audio_window

FRAMES = 60


class AuthorsRouter(nn.Module):
    """Convolution over time, attention pooling, linear, softmax; cross attention pools both."""

    def __init__(self, width: int, experts: int, sides: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(sides))
        self.scores = nn.ModuleList(nn.Linear(width, 1) for _ in range(sides))
        self.linear = nn.Linear(width * sides, experts)

    def forward(self, *sides: Tensor) -> Tensor:
        pooled = []
        for x, conv, score in zip(sides, self.convs, self.scores, strict=True):
            h = conv(x.permute(0, 2, 1)).permute(0, 2, 1)
            w = F.softmax(score(h), dim=1)
            pooled.append(torch.bmm(w.transpose(1, 2), h).squeeze(1))
        return F.softmax(self.linear(torch.cat(pooled, -1)), dim=-1)


def authors_linear(layer: SAMLLinear, x: Tensor, p: Tensor, scale: float) -> Tensor:
    m_a = torch.einsum("be,eri->bri", p, layer.lora_a)
    m_b = torch.einsum("be,eor->bor", p, layer.lora_b)
    y = x @ layer.weight.dequantize().T
    y = y if layer.bias is None else y + layer.bias
    return y + scale * torch.einsum("bor,bri,bti->bto", m_b, m_a, x)


def authors_attention(
    block: Any, x: Tensor, source: Tensor, p: Tensor, causal: bool = False
) -> Tensor:
    scale = 4.0
    q = authors_linear(block.q_proj, x, p, scale)
    k = authors_linear(block.k_proj, source, p, scale)
    v = authors_linear(block.v_proj, source, p, scale)
    heads = [t.unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
    mixed = F.scaled_dot_product_attention(*heads, is_causal=causal)
    return authors_linear(block.out_proj, mixed.transpose(1, 2).flatten(2), p, scale)


def authors_logits(model: Any, features: Tensor, ids: Tensor) -> Tensor:
    """Whisper with the authors' experts, layer by layer."""

    def router(kind: str, sides: int) -> AuthorsRouter:
        ours = model.saml_routers[kind]
        theirs = AuthorsRouter(64, 10, sides)
        theirs.linear.load_state_dict(ours.linear.state_dict())
        pairs = [(ours.conv, ours.pool), (ours.cross_conv, ours.cross_pool)][:sides]
        for i, (conv, pool) in enumerate(pairs):
            theirs.convs[i].load_state_dict(conv.state_dict())
            theirs.scores[i].load_state_dict(pool.attention.state_dict())
        return theirs

    encoder, decoder = model.model.encoder, model.model.decoder
    plain = lambda layer, x: F.linear(x, layer.weight.dequantize(), layer.bias)  # noqa: E731
    h = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).transpose(1, 2)
    h = h + encoder.embed_positions.weight[: h.shape[1]]
    route = router("encoder", 1)
    for layer in encoder.layers:
        n = layer.self_attn_layer_norm(h)
        h = h + authors_attention(layer.self_attn, n, n, route(n))
        h = h + plain(layer.fc2, F.gelu(plain(layer.fc1, layer.final_layer_norm(h))))
    encoded = encoder.layer_norm(h)
    t = decoder.embed_tokens(ids) + decoder.embed_positions.weight[: ids.shape[1]]
    own, cross = router("decoder", 1), router("cross", 2)
    for layer in decoder.layers:
        n = layer.self_attn_layer_norm(t)
        t = t + authors_attention(layer.self_attn, n, n, own(n), causal=True)
        n = layer.encoder_attn_layer_norm(t)
        t = t + authors_attention(layer.encoder_attn, n, encoded, cross(n, encoded))
        t = t + plain(layer.fc2, F.gelu(plain(layer.fc1, layer.final_layer_norm(t))))
    return decoder.layer_norm(t) @ decoder.embed_tokens.weight.dequantize().T


@pytest.fixture
def model() -> Any:
    """Two layers a side, experts and routers away from their starting point."""
    whisper = small_whisper(layers=2)
    apply_saml(whisper, SAMLConfig.paper())
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in whisper.saml.experts().values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return whisper


def features(clips: int = 2) -> Tensor:
    return torch.randn(clips, 80, FRAMES, generator=torch.Generator().manual_seed(3))


def test_the_preset_is_the_authors_setting(model: Any) -> None:
    config = SAMLConfig.paper()
    assert (config.num_experts, config.rank, config.scaling, config.dropout) == (10, 1, 4.0, 0.2)
    assert (config.top_k, config.balance) == (None, 0.0)
    with_experts = {
        n.rsplit(".", 1)[-1]
        for n, m in model.named_modules()
        if isinstance(m, SAMLLinear) and len(m.lora_a)
    }
    assert with_experts == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert set(model.saml_routers) == {"encoder", "decoder", "cross"}


@torch.no_grad()
def test_whole_model_is_the_authors_equations(model: Any) -> None:
    ids = torch.tensor([[1, 5, 9, 7], [1, 8, 3, 4]])
    with audio_window(model, FRAMES):
        ours = model(input_features=features(), decoder_input_ids=ids, use_cache=False).logits
    theirs = authors_logits(model, features(), ids)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_gates_freeze_after_the_first_step_of_cached_decoding(model: Any) -> None:
    slots = {n: m.q_proj.block for n, m in model.named_modules() if hasattr(m, "q_proj")}
    prompt = torch.tensor([[1, 5], [1, 8]])
    with audio_window(model, FRAMES):
        first = model(input_features=features(), decoder_input_ids=prompt, use_cache=True)
        gates = {n: slot.gates.clone() for n, slot in slots.items()}
        for token in (9, 7):
            model(
                encoder_outputs=(first.encoder_last_hidden_state,),
                decoder_input_ids=torch.full((2, 1), token),
                past_key_values=first.past_key_values,
            )
        for name, slot in slots.items():
            assert slot.gates.shape == (2, 1, 10)
            assert torch.equal(slot.gates, gates[name]), name
        model(input_features=features(3), decoder_input_ids=torch.tensor([[1, 5]] * 3))
    for name, slot in slots.items():
        assert slot.gates.shape[0] == 3, name


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_forgets_the_clip_before(model: Any, beams: int) -> None:
    def heard(x: Tensor) -> Tensor:
        with audio_window(model, FRAMES):
            return model.generate(x, num_beams=beams, max_new_tokens=6, min_new_tokens=6)

    one, other = features()[:1], features()[1:]
    alone = heard(one)
    heard(other)
    assert torch.equal(heard(one), alone)
    together = heard(torch.cat((one, other)))
    assert torch.equal(together[:1], alone)


def test_everything_is_trained(model: Any) -> None:
    model.train()
    with audio_window(model, FRAMES):
        out = model(input_features=features(), decoder_input_ids=torch.tensor([[1, 5, 9]] * 2))
    out.logits.square().mean().backward()
    for name, parameter in model.saml.experts().items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
