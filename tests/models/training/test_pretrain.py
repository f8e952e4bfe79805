"""Stage 1: what of it is kept, and voices with gates of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import small_whisper

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.data.corpora import Utterance
from saml_models.training.checkpoint import forget
from saml_models.training.loop import fit
from saml_models.training.options import TrainingOptions
from saml_models.training.pretrain import ENCODER_SHARE, pretrain

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


def test_a_share_of_what_the_encoder_learns_is_kept(tiny_en: Any, clips: list[Utterance]) -> None:
    learnt: dict[float | None, dict[str, torch.Tensor]] = {}
    for share in (1.0, 0.25, 0.0, None):
        model = made()
        profile = pretrain(model, tiny_en[1], clips, OPTIONS, encoder_share=share)
        expected = ENCODER_SHARE if share is None else share
        assert profile.about["encoder_share"] == expected
        learnt[expected] = profile.experts(model)
        if share == 0.0:  # the encoder is what it was before
            layer = model.get_encoder().layers[0].fc1
            x = torch.randn(3, layer.in_features)
            bare = torch.nn.functional.linear(x, layer.weight.dequantize(), layer.bias)
            assert torch.allclose(layer(x), bare, atol=1e-4)
    for share, found in learnt.items():
        for name, whole in learnt[1.0].items():
            ours = ".encoder." in name and name.endswith("lora_b")
            assert not ours or whole.abs().max() > 1e-3
            wanted = whole * share if ours else whole
            assert torch.allclose(found[name], wanted, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("start", ["lora", "loftq"])
def test_a_seed_says_what_is_learnt(tiny_en: Any, clips: list[Utterance], start: str) -> None:
    """Whatever was drawn before, where the experts start included; and the caller's draws stay."""
    found = []
    for before, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(before)
        model = made(start)
        drawn = torch.get_rng_state()
        found.append(pretrain(model, tiny_en[1], clips, replace(OPTIONS, seed=seed)).hash)
        assert torch.equal(torch.get_rng_state(), drawn)
    assert found[0] == found[1] != found[2]


def test_runs_start_alike_and_end_as_their_mean(
    tiny_en: Any, clips: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them is the training of that seed alone."""
    starts, ends, seeds = list[Any](), list[Any](), list[int]()

    def watched(
        speech: Any, samples: Any, options: TrainingOptions, *args: Any, **more: Any
    ) -> Any:
        own = speech.network.saml.experts()
        starts.append({name: tensor.detach().clone() for name, tensor in own.items()})
        report = fit(speech, samples, options, *args, **more)
        ends.append({name: tensor.detach().clone() for name, tensor in own.items()})
        seeds.append(options.seed)
        return report

    monkeypatch.setattr("saml_models.training.pretrain.fit", watched)
    shown: list[tuple[int, int]] = []
    alone = pretrain(made(), tiny_en[1], clips, OPTIONS)
    both = pretrain(
        model := made(), tiny_en[1], clips, OPTIONS,
        encoder_share=1.0, runs=2, on_step=lambda done, steps, _: shown.append((done, steps)),
    )  # fmt: skip
    assert seeds == [0, 0, 1]
    steps = alone.about["steps"]
    assert shown == [(step + 1, 2 * steps) for step in range(2 * steps)]
    assert (both.about["runs"], both.about["steps"]) == (2, 2 * steps)
    found = both.experts(model)
    for name in found:
        assert torch.equal(starts[1][name], starts[2][name])
        assert torch.equal(ends[0][name], ends[1][name])
        mean = (ends[1][name] + ends[2][name]) / 2
        assert torch.allclose(found[name], mean, atol=0.02 * float(mean.abs().max()))
    assert any(not torch.equal(ends[1][name], ends[2][name]) for name in found)


def test_runs_that_are_killed_resume(tiny_en: Any, clips: list[Utterance], tmp_path: Path) -> None:
    """In the second of them, and the first is not learnt again."""
    options = replace(OPTIONS, checkpoint_every=1)
    whole = pretrain(made(), tiny_en[1], clips, options, runs=2)
    steps, taken = whole.about["steps"], list[int]()

    def step(done: int, _: int, __: float) -> None:
        taken.append(done)
        if done == steps // 2 + 1 and taken.count(done) == 1:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "experts.checkpoint"

    def learn() -> Any:
        return pretrain(
            made(), tiny_en[1], clips, options, runs=2, checkpoint=checkpoint, on_step=step
        )

    with pytest.raises(KeyboardInterrupt):
        learn()
    assert learn().hash == whole.hash
    assert taken == list(range(1, steps + 1))
    forget(checkpoint)
    assert not list(tmp_path.iterdir())


def test_no_runs_are_refused(tiny_en: Any, clips: list[Utterance]) -> None:
    with pytest.raises(SAMLError, match="0 runs; give at least one"):
        pretrain(made(), tiny_en[1], clips, OPTIONS, runs=0)


def test_experts_that_have_learnt_before_are_kept_whole(
    tiny_en: Any, clips: list[Utterance]
) -> None:
    """Between their start and what they learnt lies neither: they undo an error of rounding."""
    for again in (False, True):
        model = made("lora" if again else "loftq")
        if again:
            pretrain(model, tiny_en[1], clips, OPTIONS)
        with pytest.raises(SAMLError, match=r"encoder share of 0.5 .*start as a LoRA's.*give 1"):
            pretrain(model, tiny_en[1], clips, OPTIONS, encoder_share=0.5)
        profile = pretrain(model, tiny_en[1], clips, OPTIONS)
        assert profile.about["encoder_share"] == 1.0


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


def test_routers_that_look_at_nothing_are_refused_before_anything_is_heard(
    tiny_en: Any, clips: list[Utterance]
) -> None:
    model, heard = small_whisper(vocabulary=51864), list[int]()
    apply_saml(model, SAMLConfig(num_experts=2, rank=2, router="speaker", expert_init="lora"))
    with pytest.raises(SAMLError, match="speaker_rate"):
        pretrain(
            model, tiny_en[1], clips, replace(OPTIONS, speaker_rate=0.1),
            on_heard=lambda *done: heard.append(1),
        )  # fmt: skip
    assert not heard


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(
    tiny_en: Any, clips: list[Utterance], share: float
) -> None:
    with pytest.raises(SAMLError, match=r"encoder share.*0 to 1"):
        pretrain(made(), tiny_en[1], clips, OPTIONS, encoder_share=share)
