"""Stage 1: what of it is kept, and voices with gates of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import small_whisper

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.data.corpora import Utterance
from saml_models.training.options import TrainingOptions
from saml_models.training.pretrain import pretrain

OPTIONS = TrainingOptions(epochs=2, max_batch=2, speeds=(1.0,), learning_rate=1e-2)


def spoken(speaker: str, number: int) -> Utterance:
    noise = np.random.default_rng(number).normal(0, 0.1, 8000).astype(np.float32)
    return Utterance(f"{speaker}-{number}", speaker, "Some words.", Path(speaker), samples=noise)


@pytest.fixture
def clips() -> list[Utterance]:
    return [spoken("a", 0), spoken("a", 1), spoken("b", 2)]


def made(init: str = "lora") -> Any:
    model = small_whisper(vocabulary=51864)
    torch.manual_seed(1)
    apply_saml(model, SAMLConfig(num_experts=2, rank=2, expert_init=init))
    return model


@pytest.mark.parametrize("init", ["lora", "loftq"])
def test_a_share_of_what_the_encoder_learns_is_kept(
    tiny_en: Any, clips: list[Utterance], init: str
) -> None:
    model = made(init)
    start = {n: t.detach().clone() for n, t in model.saml.experts().items()}
    learnt: dict[float, dict[str, torch.Tensor]] = {}
    for share in (1.0, 0.25):
        model = made(init)
        profile = pretrain(model, tiny_en[1], clips, OPTIONS, encoder_share=share)
        assert profile.about["encoder_share"] == share
        learnt[share] = profile.experts(model)
    for name, whole in learnt[1.0].items():
        kept, before = learnt[0.25][name], start[name]
        if ".encoder." in name and name.endswith("lora_b"):
            expected = torch.lerp(before, whole, 0.25)
            step = float((whole - before).abs().max())
            assert step > 1e-3
            assert torch.allclose(kept, expected, atol=0.02 * float(expected.abs().max()))
        else:
            assert torch.equal(kept, whole)


def test_voices_own_gates_are_forgotten(tiny_en: Any, clips: list[Utterance]) -> None:
    """What is learnt differs from training without them, and the routers have no offset after."""
    found = []
    for rate in (0.0, 0.1):
        model = made()
        options = TrainingOptions(
            epochs=2, max_batch=2, learning_rate=1e-2, speaker_rate=rate, anonymous=0.0
        )
        profile = pretrain(model, tiny_en[1], clips, options)
        assert all(router.offset is None for router in model.saml.routers.values())
        found.append(profile.hash)
    assert found[0] != found[1]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(
    tiny_en: Any, clips: list[Utterance], share: float
) -> None:
    with pytest.raises(SAMLError, match=r"encoder share.*0 to 1"):
        pretrain(made(), tiny_en[1], clips, OPTIONS, encoder_share=share)
