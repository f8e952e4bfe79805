"""Attention as products, while a Whisper learns on a CPU that multiplies bfloat16."""

from __future__ import annotations

import pytest
import torch
from synthetic import small_conformer, small_whisper

from saml_models.models.interface import causal_mask
from saml_models.models.registry import bind
from saml_models.training.attention import attention_as_products


def passed(model, precision):
    """Logits in bfloat16 of a decoder that sees no token behind its own, and whose attention."""
    torch.manual_seed(2)
    features, inputs = torch.randn(2, 80, 100), torch.tensor([[1, 7, 9, 12], [1, 3, 5, 4]])
    with attention_as_products(model, precision), torch.autocast("cpu", torch.bfloat16):
        used = model.config._attn_implementation
        logits = bind(model, None).outputs(features, None, inputs, torch.arange(8)).logits
    return logits, used


@torch.no_grad()
def test_a_whisper_says_the_same_either_way():
    model = small_whisper(layers=2)
    own = model.config._attn_implementation
    (fused, was), (products, now) = passed(model, "no"), passed(model, "bf16")
    assert (was, now, model.config._attn_implementation) == (own, "eager", own)
    torch.testing.assert_close(fused, products, rtol=0.05, atol=0.05 * float(fused.abs().max()))


def test_it_is_put_back_after_an_error():
    model = small_whisper()
    own = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attention_as_products(model, "bf16"):
        raise ZeroDivisionError
    assert model.config._attn_implementation == own


def test_other_models_keep_theirs():
    model, _ = small_conformer()
    own = model.config._attn_implementation
    with attention_as_products(model, "bf16"):
        assert model.config._attn_implementation == own


@torch.no_grad()
def test_the_mask_given_is_the_one_that_transformers_makes():
    model = small_whisper()
    inputs, encoded = torch.tensor([[1, 7, 9, 12]]), torch.randn(1, 50, 64)
    decoder = model.model.decoder
    wanted, found = (
        decoder(inputs, attention_mask=mask, encoder_hidden_states=encoded).last_hidden_state
        for mask in (None, causal_mask(inputs, torch.float32))
    )
    torch.testing.assert_close(found, wanted)
