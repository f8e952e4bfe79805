"""Whisper with Conformer blocks: at the start the same logits, and transformers' own ways."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import small_conformer_whisper, small_whisper

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.models.interface import margin_of
from saml_models.models.whisper.conformer import (
    ConformerWhisper,
    ConformerWhisperConfig,
    new_branches,
    without_branches,
)
from saml_models.models.whisper.greedy import greedy
from saml_models.models.whisper.windows import audio_mask, audio_window, own_windows

PROMPT = torch.tensor([[1, 5, 6], [1, 9, 2]])


@pytest.fixture(scope="module")
def whisper() -> Any:
    return small_whisper(layers=2)


@pytest.fixture(scope="module")
def grown(whisper: Any) -> Any:
    return ConformerWhisper.grown_from(whisper)


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, features: torch.Tensor) -> torch.Tensor:
    with audio_window(model, features.shape[-1]):
        return model(input_features=features, decoder_input_ids=PROMPT).logits


@torch.no_grad()
def test_at_the_start_every_logit_is_whispers(
    whisper: Any, grown: Any, features: torch.Tensor
) -> None:
    assert not grown.training and grown.dtype == torch.float32
    full = torch.nn.functional.pad(features, (0, 2800))
    for heard in (features, full):
        assert torch.equal(logits(grown, heard), logits(whisper, heard))
    # Cached decoding, token by token.
    steps = []
    for model in (whisper, grown):
        cache, found = None, []
        with audio_window(model, 200):
            encoded = model.model.encoder(features)
            for token in PROMPT.T:
                out = model(
                    encoder_outputs=encoded,
                    decoder_input_ids=token[:, None],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                found.append(out.logits)
        steps.append(torch.cat(found, dim=1))
    assert torch.equal(*steps)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"decoder_input_ids": torch.tensor([[7, 1, 5], [7, 1, 8]])}],
    ids=["greedy", "beams", "a prompt that does not begin with the start"],
)
def test_at_the_start_it_generates_what_whisper_does(
    whisper: Any, grown: Any, features: torch.Tensor, options: dict[str, Any]
) -> None:
    texts = []
    for model in (whisper, grown):
        with audio_window(model, 200):
            texts.append(model.generate(features, max_new_tokens=12, **options))
    assert torch.equal(*texts)
    if not options:
        windows = [(features, audio_mask([32000, 32000], 200))]
        assert greedy(grown, windows, [12, 12]) == greedy(whisper, windows, [12, 12])


def test_the_new_branches_learn_from_the_first_step(whisper: Any, features: torch.Tensor) -> None:
    model = ConformerWhisper.grown_from(whisper).train()
    names = [name for name, value in new_branches(model).items() if not value.any()]
    kinds = {name.split(".")[-3] + "." + name.split(".")[-2] for name in names}
    assert {"half_step.fc2", "conv_module.pointwise_out"} <= kinds
    with audio_window(model, 200):
        model(input_features=features, decoder_input_ids=PROMPT).logits.square().mean().backward()
    for name, value in new_branches(model).items():
        last = ".fc2." in name or ".pointwise_out." in name
        assert bool(value.grad.any()) == last, name


def test_the_branches_say_something_and_without_them_it_is_whisper_again(
    features: torch.Tensor,
) -> None:
    model, whisper = small_conformer_whisper(3, 2), small_whisper(3, 2)
    assert not torch.allclose(logits(model, features), logits(whisper, features), atol=0.1)
    assert torch.equal(logits(without_branches(model), features), logits(whisper, features))
    assert new_branches(model)["model.encoder.layers.0.half_step.fc2.weight"].any()


def test_a_fresh_one_starts_at_nothing_too() -> None:
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50300}
    model = ConformerWhisper(
        ConformerWhisperConfig(**sizes, encoder_attention_heads=2, decoder_attention_heads=2)
    )
    assert not model.model.encoder.layers[0].half_step.fc2.weight.any()
    table = small_whisper().model.encoder.embed_positions.weight
    assert torch.equal(model.model.encoder.embed_positions.weight, table)


@torch.no_grad()
@pytest.mark.parametrize("low_bits", [False, True])
def test_a_short_row_of_a_batch_hears_what_it_hears_alone(
    features: torch.Tensor, low_bits: bool
) -> None:
    model = small_conformer_whisper(layers=2)
    if low_bits:
        apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    with audio_window(model, 100):
        alone = model.model.encoder(features[:1, :, :100]).last_hidden_state
    both = features.clone()
    with audio_window(model, 200), own_windows(model, both, [100, 200]):
        beside = model.model.encoder(both).last_hidden_state
        torch.testing.assert_close(beside[:1, :50], alone, rtol=1e-4, atol=1e-4)
    with audio_window(model, 200):  # without windows of their own what follows is heard
        mixed = model.model.encoder(features).last_hidden_state
    assert (mixed[:1, :50] - alone).abs().max() > 1e-2


def test_saved_and_loaded_by_transformers(tmp_path: Path, features: torch.Tensor) -> None:
    model = small_conformer_whisper(layers=2)
    model.save_pretrained(tmp_path)
    again = ConformerWhisper.from_pretrained(tmp_path).eval()
    assert again.config.conv_kernel_size == 7 and again.config.half_step_ffn_dim == 96
    assert torch.equal(logits(again, features), logits(model, features))
    code = (
        "import sys, saml_models.hf\n"
        "from transformers import AutoModelForSpeechSeq2Seq\n"
        "model = AutoModelForSpeechSeq2Seq.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__, model.config.conv_kernel_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["ConformerWhisper", "7"]


def test_the_windows_that_it_has_learnt_are_its_own_in_low_bits_too(whisper: Any) -> None:
    model: Any = ConformerWhisper.grown_from(whisper, window_margin=2.0)
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    model.saml.margin = 10.0
    for short in (False, True):
        model.saml.short_windows = short
        assert margin_of(model) == 2.0


def test_what_it_cannot_grow_from(whisper: Any, grown: Any) -> None:
    with pytest.raises(SAMLError, match="odd number"):
        ConformerWhisper.grown_from(whisper, conv_kernel_size=8)
    with pytest.raises(SAMLError, match="window_margin: 31 s; expected 0 to 30, or None"):
        ConformerWhisper.grown_from(whisper, window_margin=31)
    with pytest.raises(SAMLError, match="half_step_ffn_dim"):
        ConformerWhisper.grown_from(whisper, half_step_ffn_dim=0)
    with pytest.raises(SAMLError, match="full precision"):
        ConformerWhisper.grown_from(grown)
