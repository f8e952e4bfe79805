"""Routers: what they look at, what they leave out, and what they ask of training."""

from __future__ import annotations

import pytest
import torch

from saml_kernels import SAMLConfig, SAMLError
from saml_kernels.layers.context import BatchContext
from saml_kernels.layers.routers import (
    AttentionPooling,
    SharedRouter,
    SpeakerRouter,
    TokenRouter,
    UtteranceRouter,
    gates_from_logits,
)

WIDTH = 16


def filled(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_token_router_looks_at_each_token_alone() -> None:
    router = filled(TokenRouter(WIDTH, SAMLConfig(), BatchContext()))
    x = torch.randn(2, 5, WIDTH)
    gates = router(x)
    assert gates.shape == (2, 5, 4)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(gates[1, 3], torch.softmax(router.weight @ x[1, 3], -1))


def test_routers_start_with_equal_shares() -> None:
    x = torch.randn(2, 5, WIDTH)
    for router in (
        TokenRouter(WIDTH, SAMLConfig(), BatchContext()),
        UtteranceRouter(WIDTH, SAMLConfig(), BatchContext()),
        SpeakerRouter(SAMLConfig(), BatchContext()),
    ):
        gates = router(x)
        torch.testing.assert_close(gates, torch.full_like(gates, 0.25))


def test_utterance_router_is_deaf_to_masked_padding() -> None:
    context = BatchContext()
    router = filled(UtteranceRouter(WIDTH, SAMLConfig(), context))
    x = torch.randn(2, 6, WIDTH)
    context.mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    gates = router(x)
    changed = x.clone()
    changed[1, 4:] = 100.0
    torch.testing.assert_close(router(changed), gates)
    changed[1, 3] = 100.0
    assert not torch.allclose(router(changed), gates)
    torch.testing.assert_close(gates[1:], _without_mask(router, x[1:, :4]))


def _without_mask(router: UtteranceRouter, x: torch.Tensor) -> torch.Tensor:
    mask, router.context.mask = router.context.mask, None
    gates = router(x)
    router.context.mask = mask
    return gates


def test_the_mask_follows_beams_and_keeps_off_other_windows() -> None:
    context = BatchContext(mask=torch.tensor([[True, False], [True, True]]))
    expected = torch.tensor([[1.0, 0]] * 3 + [[1, 1]] * 3).bool()
    assert torch.equal(context.mask_for(torch.zeros(6, 2, WIDTH)), expected)
    assert context.mask_for(torch.zeros(2, 3, WIDTH)) is None
    assert context.mask_for(torch.zeros(3, 2, WIDTH)) is None
    assert BatchContext().mask_for(torch.zeros(2, 2, WIDTH)) is None


def test_a_clip_masked_entirely_gives_finite_gates() -> None:
    context = BatchContext(mask=torch.zeros(1, 4, dtype=torch.bool))
    router = filled(UtteranceRouter(WIDTH, SAMLConfig(), context))
    assert torch.isfinite(router(torch.randn(1, 4, WIDTH))).all()


def test_decoder_reads_the_encoded_clip() -> None:
    context = BatchContext(clip=torch.randn(2, WIDTH))
    router = filled(UtteranceRouter(WIDTH, SAMLConfig(), context, clip_width=WIDTH))
    gates = router(torch.randn(6, 1, WIDTH))  # three beams a clip
    want = torch.softmax(context.clip @ router.weight.T, -1).repeat_interleave(3, 0)
    torch.testing.assert_close(gates.squeeze(1), want)
    with pytest.raises(SAMLError, match="5 decoder rows"):
        router(torch.randn(5, 1, WIDTH))
    context.clip = None
    with pytest.raises(SAMLError, match="run the encoder"):
        router(torch.randn(2, 1, WIDTH))


def test_speaker_router_does_not_look() -> None:
    router = filled(SpeakerRouter(SAMLConfig(), BatchContext()))
    assert torch.equal(router(torch.randn(2, 5, WIDTH)), router(torch.zeros(1, 9, WIDTH)))


def test_top_k_keeps_the_largest_and_renormalises() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.0, 0.0]])
    gates = gates_from_logits(logits, SAMLConfig(top_k=2), BatchContext(), training=False)
    assert torch.equal(gates > 0, torch.tensor([[True, False, True, False]]))
    torch.testing.assert_close(gates[0, [0, 2]], torch.softmax(logits[0, [0, 2]], -1))
    whole = gates_from_logits(logits, SAMLConfig(top_k=4), BatchContext(), training=False)
    torch.testing.assert_close(whole, torch.softmax(logits, -1))


def test_temperature_sharpens() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 0.0])
    gates = gates_from_logits(logits, SAMLConfig(temperature=0.5), BatchContext(), training=False)
    torch.testing.assert_close(gates, torch.softmax(2 * logits, -1))


def test_balance_is_smallest_for_an_even_load() -> None:
    config, context = SAMLConfig(balance=0.01), BatchContext()
    even = 20 * torch.eye(4)
    one_sided = even[:1].expand(4, 4)
    gates_from_logits(even, config, context, training=True)
    low = context.balance_loss()
    gates_from_logits(one_sided, config, context, training=True)
    high = context.balance_loss()
    torch.testing.assert_close(low, torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(high, torch.tensor(4.0), rtol=1e-4, atol=1e-4)
    gates_from_logits(even, config, context, training=False)
    gates_from_logits(even, SAMLConfig(balance=0.0), context, training=True)
    assert context.balance_loss() is None


def test_balance_pushes_towards_an_even_load() -> None:
    logits = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0]], requires_grad=True)
    context = BatchContext()
    gates_from_logits(logits, SAMLConfig(balance=1.0), context, training=True)
    loss = context.balance_loss()
    assert loss is not None
    loss.backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_attention_pooling_masks() -> None:
    pool = filled(AttentionPooling(WIDTH))
    x = torch.randn(2, 5, WIDTH)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    torch.testing.assert_close(pool(x, mask)[1:], pool(x[1:, :3]))
    torch.testing.assert_close(pool(x, mask)[:1], pool(x[:1]))


def test_shared_router_of_text_ignores_the_audio_mask() -> None:
    context = BatchContext(mask=torch.tensor([[True, False, False]]))
    x = torch.randn(1, 3, WIDTH)
    text = filled(SharedRouter(WIDTH, SAMLConfig.paper(), context, text=True))
    audio = filled(SharedRouter(WIDTH, SAMLConfig.paper(), context))
    masked = audio(x)
    assert not torch.allclose(text(x), masked)
    context.mask = None
    torch.testing.assert_close(text(x), audio(x))


def test_shared_cross_router_needs_the_encoder() -> None:
    router = SharedRouter(WIDTH, SAMLConfig.paper(), BatchContext(), cross=True)
    with pytest.raises(SAMLError, match="encoder's output"):
        router(torch.randn(1, 3, WIDTH))
