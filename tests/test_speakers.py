"""Profiles: what they hold, which models they fit, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from synthetic import small_whisper

from saml_kernels import SAMLConfig, SAMLError
from saml_models.speakers import SpeakerProfile
from saml_models.surgery import apply_saml, expert_parameters

CONFIG = SAMLConfig(num_experts=2, rank=2, expert_init="lora")


def make(seed: int = 0, config: SAMLConfig = CONFIG, voice: int | None = None) -> Any:
    model = small_whisper(seed)
    apply_saml(model, config)
    if voice is not None:
        speak_as(model, voice)
    return model


def speak_as(model: Any, voice: int) -> None:
    torch.manual_seed(voice)
    with torch.no_grad():
        for parameter in expert_parameters(model).values():
            parameter.copy_(torch.randn_like(parameter) * 0.05)


def experts(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in expert_parameters(model).values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("expert_format", ["int8", "float16"])
def test_save_and_load(expert_format: Any, tmp_path: Path) -> None:
    model = make(config=replace(CONFIG, expert_format=expert_format), voice=1)
    model.saml_short_windows = True
    profile = SpeakerProfile.of(model, speaker="1688", model="tiny.en", utterances=20)
    profile.save(tmp_path / "a.safetensors")
    again = SpeakerProfile.load(tmp_path / "a.safetensors")
    assert again.hash == profile.hash
    assert again.about == profile.about
    assert again.about["speaker"] == "1688"
    assert again.about["model"] == "tiny.en"
    assert again.config == model.saml_config.to_dict()
    assert again.nbytes == sum(t.numel() * t.element_size() for t in again.tensors.values())
    other = make(config=replace(CONFIG, expert_format=expert_format))
    again.apply(other)
    assert other.saml_short_windows is True
    assert SpeakerProfile.of(other).hash == profile.hash
    torch.testing.assert_close(experts(other), experts(model), rtol=0.01, atol=2e-3)


def test_applied_gives_everything_back() -> None:
    model = make(voice=1)
    profile = SpeakerProfile.of(make(voice=2))
    before = experts(model)
    with pytest.raises(KeyError), profile.applied(model):
        assert SpeakerProfile.of(model).hash == profile.hash
        raise KeyError
    assert same(experts(model), before)
    assert profile.hash != SpeakerProfile.of(model).hash


def test_another_model_is_refused_and_left_alone() -> None:
    profile = SpeakerProfile.of(make(voice=1), model="tiny.en")
    for other, reason in [
        (make(seed=1, voice=2), "another model"),
        (make(config=replace(CONFIG, rank=4)), "rank=2"),
        (make(config=replace(CONFIG, router="speaker")), "router='token'"),
    ]:
        before = experts(other)
        with pytest.raises(SAMLError, match=reason):
            profile.apply(other)
        with pytest.raises(SAMLError, match=reason), profile.applied(other):
            pass
        assert same(experts(other), before)
    with pytest.raises(SAMLError, match="no SAML layers"):
        profile.apply(small_whisper())


def test_what_training_alone_uses_may_differ() -> None:
    profile = SpeakerProfile.of(make(voice=1))
    profile.apply(make(config=replace(CONFIG, dropout=0.3, balance=0.1)))


def test_a_flipped_byte_never_changes_what_is_heard(tmp_path: Path) -> None:
    model = make(voice=1)
    profile = SpeakerProfile.of(model, speaker="x")
    path = tmp_path / "p.safetensors"
    profile.save(path)
    whole = path.read_bytes()
    refused = 0
    positions = [*range(0, 4000, 37), *range(4000, len(whole), 2003), len(whole) - 1]
    for position in positions:
        broken = bytearray(whole)
        broken[position] ^= 0x04
        path.write_bytes(broken)
        try:
            found = SpeakerProfile.load(path)
            found.check(model)
        except SAMLError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # the byte was in the notes for people
            assert found.hash == profile.hash
            assert found.about != profile.about or found.config != profile.config
    assert refused > len(positions) * 0.6


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(SAMLError, match="no such file"):
        SpeakerProfile.load(path)
    path.write_bytes(b"not a profile")
    with pytest.raises(SAMLError, match="not a whole safetensors file"):
        SpeakerProfile.load(path)
    tensors = {"a": torch.zeros(1)}
    for header in (
        None, "", "[]", "{", '{"kind": "other"}', '{"kind": "saml-speaker-profile"}',
        '{"kind": "saml-speaker-profile", "version": 2}',
        '{"kind": "saml-speaker-profile", "version": 1, "config": 3, "about": {}, '
        '"weight_hash": "", "checksum": ""}',
    ):  # fmt: skip
        save_file(tensors, path, None if header is None else {"saml": header})
        with pytest.raises(SAMLError, match=str(path)) as caught:
            SpeakerProfile.load(path)
        assert "\n" not in str(caught.value)


def test_altered_tensors_of_the_right_size_are_refused(tmp_path: Path) -> None:
    profile = SpeakerProfile.of(make(voice=1))
    name = next(iter(profile.tensors))
    forged = replace(profile, tensors={**profile.tensors, name: profile.tensors[name].flip(0)})
    path = tmp_path / "p.safetensors"
    forged.save(path)
    SpeakerProfile.load(path)  # whole in itself: signed by its own checksum
    data = path.read_bytes()
    path.write_bytes(data.replace(forged.hash.encode(), profile.hash.encode()))
    with pytest.raises(SAMLError, match="checksum"):
        SpeakerProfile.load(path)


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_tensors_that_do_not_fit_leave_the_model_alone(change: str) -> None:
    model = make(voice=2)
    profile = SpeakerProfile.of(make(voice=1))
    tensors = dict(profile.tensors)
    name = [n for n in tensors if n.endswith(".int8")][-1]
    value = tensors.pop(name)
    if change != "missing":
        tensors[name] = value[:-1] if change == "shape" else value.to(torch.uint8)
    before = experts(model)
    with pytest.raises(SAMLError, match=name.removesuffix(".int8")):
        replace(profile, tensors=tensors).apply(model)
    assert same(experts(model), before)


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.safetensors"
    SpeakerProfile.of(make(voice=1)).save(path)
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SAMLError, match="No space left"):
        SpeakerProfile.of(make(voice=2)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
