"""Targets in the model's style, kept in a file; clips in noise; voices of many clips."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import small_whisper

from saml_kernels import SAMLConfig
from saml_models.compress.apply import apply_saml
from saml_models.data.corpora import Utterance
from saml_models.models.registry import bind
from saml_models.training import samples as module
from saml_models.training.batches import BatchMaker
from saml_models.training.checkpoint import fingerprint
from saml_models.training.options import TrainingOptions
from saml_models.training.pretrain import pretrain

OPTIONS = TrainingOptions(epochs=1, max_batch=2, speeds=(1.0,), freq_masks=0, time_masks=0)


def spoken(speaker: str, number: int, text: str = "SOME WORDS") -> Utterance:
    noise = np.random.default_rng(number).normal(0, 0.1, 8000).astype(np.float32)
    return Utterance(f"{speaker}-{number}", speaker, text, Path(speaker), samples=noise)


@pytest.fixture
def model() -> Any:
    network = small_whisper(vocabulary=51864)
    apply_saml(network, SAMLConfig(num_experts=2, rank=2, expert_init="lora"))
    return network


def test_only_bare_texts_are_heard_and_once(
    model: Any, tiny_en: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def decode(speech: Any, clips: Any, **options: Any) -> list[str]:
        asked.append(len(clips))
        return ["Some words."] * len(clips)

    monkeypatch.setattr(module, "decode_clips", decode)
    monkeypatch.setattr(module, "TOGETHER", 2)
    said = [spoken("a", 0), spoken("a", 1, "As it is."), spoken("b", 2)]
    speech, heard, done = bind(model, tiny_en[1]), tmp_path / "heard.json", list[Any]()
    first = module.training_samples(speech, said, heard=heard, on_done=lambda *n: done.append(n))
    assert [s.text for s in first] == ["Some words.", "As it is.", "Some words."]
    assert asked == [1, 1] and done == [(2, 3), (3, 3)]
    again = module.training_samples(speech, said, heard=heard)
    assert [s.text for s in again] == [s.text for s in first]
    assert sum(asked) == 2
    # What another model heard is not its style.
    heard.write_text(json.dumps(json.loads(heard.read_text()) | {"model": "another"}))
    module.training_samples(speech, said, heard=heard)
    assert sum(asked) == 4


def test_noise_in_a_share_of_the_clips_the_same_each_time(model: Any, tiny_en: Any) -> None:
    clips = [spoken("a", i).load() for i in range(12)]
    samples = [
        module.Sample(lambda clip=clip: clip, len(clip) / 16000, "Some words.") for clip in clips
    ]
    speech = bind(model, tiny_en[1])
    plain = BatchMaker(speech, samples, OPTIONS)
    noisy = BatchMaker(speech, samples, replace(OPTIONS, noise=0.5))
    changed = []
    for step in range(30):
        index = [step % 12]
        one, two = noisy(step, index), noisy(step, index)
        assert torch.equal(one.features, two.features)
        changed.append(not torch.equal(one.features, plain(step, index).features))
    assert 6 < sum(changed) < 24


def test_a_long_clip_is_heard_to_its_end_at_every_speed(model: Any, tiny_en: Any) -> None:
    clip = np.zeros(int(29.9 * 16000), np.float32)
    clip[-16000:] = np.random.default_rng(0).normal(0, 0.3, 16000)
    samples = [module.Sample(lambda: clip, 29.9, "Some words.")]
    slow, plain = (
        BatchMaker(bind(model, tiny_en[1]), samples, replace(OPTIONS, speeds=(speed,)))(0, [0])
        for speed in (0.9, 1.0)
    )
    assert torch.equal(slow.features, plain.features)


def test_what_a_checkpoint_has_to_be_of(model: Any, tiny_en: Any) -> None:
    samples = [module.Sample(lambda: None, seconds, "Some words.") for seconds in (1.0, 2.0)]
    runs = [
        fingerprint(model, samples, OPTIONS),
        fingerprint(model, samples[:1], OPTIONS),
        fingerprint(model, samples, replace(OPTIONS, noise=0.5)),
        fingerprint(model, samples, OPTIONS, "other experts"),
    ]
    # It is in the header of a file, which has a limit.
    assert len(set(runs)) == 4 and all(len(run) == 64 for run in runs)
    assert fingerprint(model, samples, replace(OPTIONS, checkpoint_every=7)) == runs[0]


def test_a_voice_of_many_clips_is_one_voice(
    model: Any, tiny_en: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [spoken("a", i, "Some words.") for i in range(9)] + [spoken("b", 20, "Others.")]
    profile = pretrain(model, tiny_en[1], said, OPTIONS, per_speaker=3)
    assert profile.about["speakers"] == 2 and profile.about["utterances"] == 4
