"""Layers that hold many speakers' experts: each clip is as with its own speaker's alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from saml_kernels import SAMLConfig, SAMLError, SAMLLinear, quantize
from saml_kernels.backends import grouping
from saml_kernels.backends.reference import everybodys_logits
from saml_kernels.layers.context import BatchContext, SpeakerExperts

K, N, SPEAKERS = 64, 48, 3


def mixed_batch(config, seed, routing, clip_width=None):
    """One layer, the same base each time, with experts and router of speaker `seed`."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    layer = SAMLLinear.from_linear(linear, config, routing, clip_width=clip_width).eval()
    torch.manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in (layer.lora_a, layer.lora_b, layer.router.weight):
            parameter.copy_(torch.randn_like(parameter))
    return layer


def stacked(layers, offsets=None):
    columns = ([getattr(x, n).detach() for x in layers] for n in ("lora_a", "lora_b"))
    routers = [layer.router.weight.detach() for layer in layers]
    offset = None if offsets is None else torch.stack(offsets)
    return SpeakerExperts(*map(torch.stack, columns), torch.stack(routers), offset)


def test_gates_of_many_speakers_wait_for_no_gpu():
    """A step that waits cannot be captured."""
    x, routers = torch.randn(6, 5, K), torch.randn(SPEAKERS, 4, K)
    speakers = torch.tensor([0, 2, 2, 1, 0, 2], dtype=torch.int32).unsqueeze(1)
    expected = grouping.logits(x, routers, speakers)
    torch.testing.assert_close(everybodys_logits(x, routers, speakers), expected)
    # Without values, whoever asks for them fails.
    assert grouping.logits(*(t.to("meta") for t in (x, routers, speakers))).shape == expected.shape


CONFIGS = {
    "token": SAMLConfig(num_experts=4, rank=3),
    "token top 2": SAMLConfig(num_experts=4, rank=3, top_k=2),
    "utterance": SAMLConfig(num_experts=4, rank=3, router="utterance"),
    "utterance merged": SAMLConfig(num_experts=4, rank=3, router="utterance", mix="merged"),
    "speaker": SAMLConfig(num_experts=4, rank=3, router="speaker"),
    "speaker merged": SAMLConfig(num_experts=4, rank=3, router="speaker", mix="merged"),
}


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_clip_by_its_own_speaker(name, offsets):
    config, routing = CONFIGS[name], BatchContext()
    layers = [mixed_batch(config, s, routing) for s in range(SPEAKERS)]
    added = [torch.randn(4) for _ in layers] if offsets else None
    shared = mixed_batch(config, 9, routing)
    shared.speaker_experts = stacked(layers, added)
    for index in ([2, 0, 0, 1], [1, 1, 1, 1], [0, 1, 2, 0]):
        routing.speakers = torch.tensor(index, dtype=torch.int32)
        for beams in (1, 2):
            x = torch.randn(len(index) * beams, 5, K)
            found = shared(x)
            for row in range(len(x)):
                layer = layers[index[row // beams]]
                layer.router.offset = None if added is None else added[index[row // beams]]
                alone = layer(x[row : row + 1])
                torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-3)


def test_one_token_a_row_and_a_decoder_that_reads_the_clip():
    config, routing = CONFIGS["utterance"], BatchContext()
    layers = [mixed_batch(config, s, routing, clip_width=K) for s in range(2)]
    shared = mixed_batch(config, 9, routing, clip_width=K)
    shared.speaker_experts = stacked(layers)
    clips, x = torch.randn(2, K), torch.randn(4, K)
    routing.speakers, routing.clip = torch.tensor([1, 0], dtype=torch.int32), clips
    found = shared(x)
    for row, s in enumerate((1, 1, 0, 0)):
        routing.clip = clips[row // 2 : row // 2 + 1]
        alone = layers[s](x[row].view(1, 1, K)).view(N)
        torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-3)


def test_an_expert_that_a_speaker_has_not_is_not_heard():
    config, routing = CONFIGS["token"], BatchContext()
    layer = mixed_batch(config, 0, routing)
    few = mixed_batch(SAMLConfig(num_experts=2, rank=3), 0, routing)
    with torch.no_grad():
        few.lora_a.copy_(layer.lora_a[1:3])
        few.lora_b.copy_(layer.lora_b[1:3])
        few.router.weight.copy_(layer.router.weight[1:3])
    layer.speaker_experts = stacked([layer], [torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])])
    routing.speakers = torch.zeros(2, dtype=torch.int32)
    x = torch.randn(2, 7, K)
    torch.testing.assert_close(layer(x), few(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["token", "speaker", "speaker merged"])
def test_experts_in_int8(name):
    config = replace(CONFIGS[name], rank=4)
    layers = [mixed_batch(config, s, BatchContext()) for s in range(SPEAKERS)]
    shared = mixed_batch(config, 9, BatchContext())
    shared.context.speakers = torch.tensor([2, 0, 0, 1], dtype=torch.int32)
    wide, x = stacked(layers), torch.randn(4, 5, K)
    kept = [quantize(t, "int8", 64, double_quant=False) for t in (wide.lora_a, wide.lora_b)]
    found = []
    for a, b in (kept, [t.dequantize() for t in kept]):
        shared.speaker_experts = SpeakerExperts(a, b, wide.router)
        with torch.no_grad():
            found.append(shared(x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_rows_must_be_the_beams_of_clips():
    layer = mixed_batch(CONFIGS["token"], 0, BatchContext())
    layer.speaker_experts = stacked([layer])
    with pytest.raises(SAMLError, match="none for 2 rows"):
        layer(torch.randn(2, 3, K))
    layer.context.speakers = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(SAMLError, match="2 for 3 rows; expected one for each clip"):
        layer(torch.randn(3, 3, K))
    layer.context.speakers = torch.ones(3, dtype=torch.int32)
    with pytest.raises(SAMLError, match=r"holds 1; expected 0\.\.0"):
        layer(torch.randn(3, 3, K))


def test_an_offset_learns_and_is_no_part_of_the_state():
    layer = mixed_batch(CONFIGS["token"], 0, BatchContext()).train()
    offset = torch.zeros(4, requires_grad=True)
    before = layer.state_dict().keys()
    layer.router.offset = offset
    assert layer.state_dict().keys() == before
    assert all(p is not offset for p in layer.parameters())
    layer(torch.randn(6, K)).square().sum().backward()
    assert offset.grad.abs().sum() > 0
