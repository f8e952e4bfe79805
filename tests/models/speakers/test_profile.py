"""Profiles: what they hold, which models they fit, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_voices import CONFIG, make, speak_as
from synthetic import small_whisper

from saml_kernels import SAMLConfig, SAMLError
from saml_models.runtime.tensors import read_tensors
from saml_models.speakers.profile import SpeakerProfile


def experts(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.saml.experts().values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("expert_format", ["int8", "float16"])
def test_save_and_load(expert_format: Any, tmp_path: Path) -> None:
    model = make(config=replace(CONFIG, expert_format=expert_format), voice=1)
    model.saml.short_windows = True
    profile = SpeakerProfile.of(model, speaker="1688", model="tiny.en", utterances=20)
    profile.save(tmp_path / "a.safetensors")
    again = SpeakerProfile.load(tmp_path / "a.safetensors")
    assert again.hash == profile.hash
    assert again.about == profile.about
    assert again.about["speaker"] == "1688"
    assert again.about["model"] == "tiny.en"
    assert again.config == model.saml.config.to_dict()
    assert again.nbytes == sum(t.numel() * t.element_size() for t in again.tensors.values())
    other = make(config=replace(CONFIG, expert_format=expert_format))
    again.apply(other)
    assert other.saml.short_windows is True
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
    positions = [*range(0, 4000, 37), *range(4000, len(whole), 2003), len(whole) - 1]
    for position in positions:
        broken = bytearray(whole)
        broken[position] ^= 0x04
        path.write_bytes(broken)
        with pytest.raises(SAMLError) as caught:
            SpeakerProfile.load(path).check(model)
        assert "\n" not in str(caught.value)


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
        '{"kind": "saml-speaker-profile", "version": 3}',
        '{"kind": "saml-speaker-profile", "version": 1, "config": 3, "about": {}, '
        '"weight_hash": "", "checksum": ""}',
    ):  # fmt: skip
        save_file(tensors, path, None if header is None else {"saml": header})
        with pytest.raises(SAMLError, match=str(path)) as caught:
            SpeakerProfile.load(path)
        assert "\n" not in str(caught.value)


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    """The checksum of version 1 covered the tensors alone."""
    profile = SpeakerProfile.of(make(voice=1), speaker="x")
    header = {
        "kind": "saml-speaker-profile", "version": 1, "weight_hash": profile.weight_hash,
        "config": profile.config, "about": profile.about, "checksum": profile.hash,
    }  # fmt: skip
    path = tmp_path / "p.safetensors"
    save_file(profile.tensors, path, {"saml": json.dumps(header)})
    assert SpeakerProfile.load(path).hash == profile.hash
    save_file(profile.tensors, path, {"saml": json.dumps(header | {"checksum": "0"})})
    with pytest.raises(SAMLError, match="checksum"):
        SpeakerProfile.load(path)


def test_altered_notes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    SpeakerProfile.of(make(voice=1), speaker="ann").save(path)
    path.write_bytes(path.read_bytes().replace(b"ann", b"bob"))
    with pytest.raises(SAMLError, match="checksum"):
        SpeakerProfile.load(path)


def test_altered_tensors_of_the_right_size_are_refused(tmp_path: Path) -> None:
    profile = SpeakerProfile.of(make(voice=1))
    name = next(iter(profile.tensors))
    forged = replace(profile, tensors={**profile.tensors, name: profile.tensors[name].flip(0)})
    path = tmp_path / "p.safetensors"
    forged.save(path)
    SpeakerProfile.load(path)  # whole in itself: signed by its own checksum
    checksum = json.loads(read_tensors(path)[1]["saml"])["checksum"]
    profile.save(path)
    data = path.read_bytes()
    other = json.loads(read_tensors(path)[1]["saml"])["checksum"]
    path.write_bytes(data.replace(other.encode(), checksum.encode()))
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


SAVE_AND_KILL = """
import os, random, select, signal, sys, time
sys.path.insert(0, os.getcwd())
from small_voices import make
from saml_models.speakers.profile import SpeakerProfile
path = sys.argv[1]
profiles = [SpeakerProfile.of(make(voice=v), speaker=str(v)) for v in (1, 2)]
random.seed(0)
for _ in range(20):
    ours, theirs = os.pipe()
    child = os.fork()
    while child == 0:
        for profile in profiles:
            profile.save(path)
            os.write(theirs, b".")
    started = time.monotonic()
    assert select.select([ours], [], [], 20)[0], "the child saves nothing"
    time.sleep(random.uniform(0, 3) * (time.monotonic() - started))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print(SpeakerProfile.load(path).name)
"""


def test_killed_while_saving_the_old_file_is_whole(tmp_path: Path) -> None:
    """SIGKILL at twenty random moments of processes that save over and over."""
    command = [sys.executable, "-c", SAVE_AND_KILL, tmp_path / "p.safetensors"]
    tests = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Kills came before, during and after a save: the file is now the one, now the other.
    assert len(done.stdout.split()) == 20 and set(done.stdout.split()) == {"1", "2"}


def test_gates_are_tiny_and_belong_to_their_experts(tmp_path: Path) -> None:
    model = make(voice=1)
    before = experts(model)
    routers = list(model.saml.routers.values())
    for i, router in enumerate(routers):
        router.offset = torch.tensor([0.25 * i, -0.5])
    profile = SpeakerProfile.of_gates(model, speaker="ann")
    assert profile.nbytes == 2 * 2 * len(routers)
    path = tmp_path / "g.safetensors"
    profile.save(path)
    assert path.stat().st_size < 3000
    again = SpeakerProfile.load(path)
    assert again.kind == "gates" and again.hash == profile.hash

    other = make(voice=1)
    ours = list(other.saml.routers.values())
    with again.applied(other):
        assert all(torch.equal(a.offset, b.offset) for a, b in zip(ours, routers, strict=True))
        assert same(experts(other), before)
    assert all(router.offset is None for router in ours)
    # Experts of one's own replace offsets that were made for others.
    again.apply(other)
    SpeakerProfile.of(make(voice=3)).apply(other)
    assert all(router.offset is None for router in ours)
    with pytest.raises(SAMLError, match="gates belong to other experts"):
        again.apply(other)


def test_a_router_of_the_whole_model_has_no_gates_profile() -> None:
    with pytest.raises(SAMLError, match="no router of their own"):
        SpeakerProfile.of_gates(make(config=SAMLConfig.paper()))


def test_the_hash_of_the_weights_is_remembered_until_they_change() -> None:
    model = make(voice=1)
    digests: list[Any] = []
    real = hashlib.sha256

    def counted(*args: Any) -> Any:
        digests.append(1)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saml_models.compress.layers.hashlib.sha256", counted)
        first = model.saml.weight_hash()
        asked = len(digests)
        assert model.saml.weight_hash() == first and len(digests) == asked
        codes = model.model.encoder.layers[0].fc1.weight.codes
        codes[0] ^= 1
        second = model.saml.weight_hash()
        assert second != first
        codes[0] ^= 1
        assert model.saml.weight_hash() == first
        model.model.encoder.layers[0].fc1.weight.codes = codes.clone()
        asked = len(digests)
        assert model.saml.weight_hash() == first and len(digests) == asked + 1
    inside = model.saml.experts_hash()
    with model.saml.snapshot():
        speak_as(model, 2)
        assert model.saml.experts_hash() != inside
    assert model.saml.experts_hash() == inside
