"""`saml quantize` and `saml pretrain`: what they write, refuse and resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from command_line import assert_refused, interrupted, saml

from saml_kernels import SAMLConfig, SAMLError
from saml_models.cli.options import checkpoint_of
from saml_models.compress.calibration_stages import check_stages, remove_stages, write_stage
from saml_models.runtime.tensors import write_tensors
from saml_models.speakers import pretrained
from saml_models.speakers.profile import SpeakerProfile


def test_quantize_writes_a_model_that_transcribes(tmp_path, profile, clips):
    out = tmp_path / "small"
    result = saml("quantize", out, "--experts", profile)
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [out]
    size = sum((out / n).stat().st_size for n in ("model.safetensors", "saml.json"))
    assert f"{size / 1e6:.2f} MB on disk" in result.stdout and "x smaller" in result.stdout
    by_folder = saml("transcribe", clips[0].audio, "--model", out)
    by_profile = saml("transcribe", clips[0].audio, "--speaker", profile)
    assert by_folder.stdout == by_profile.stdout != ""
    assert_refused(saml("quantize", out), out, "is there already")


def test_interrupted_calibration_goes_on_and_is_told_of_on_disk(tmp_path, clips, monkeypatch):
    from saml_models.cli import quantize as quantize_command

    speech, out, work = (tmp_path / name for name in ("speech", "small", "small.calibration"))
    speech.mkdir()
    for clip in clips:  # without their text
        (speech / clip.audio.name).write_bytes(clip.audio.read_bytes())
    steps = interrupted(monkeypatch, quantize_command, after=5)
    command = ("quantize", out, "--calibration", speech, "--clips", 1, "--seed", 3)
    assert_refused(saml(*command), work, "same command", code=130)
    left = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    assert len(left) == 4 and not out.exists()
    result = saml(*command)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "speech"]
    again = steps[5:]
    assert [done for done, _, _ in again] == list(range(1, again[-1][1] + 1))
    told = json.loads((out / "saml.json").read_text())["calibration"]
    assert (told["seed"], told["clips"], told["format"]) == (3, 2, "nf4")
    assert len(told["clips_sha256"]) == 64 and told["recipe"]["damping"] > 0
    assert saml("transcribe", clips[0].audio, "--model", out).stdout


def test_a_folder_of_the_users_beside_the_output_is_left_alone(tmp_path, clips):
    out, theirs = tmp_path / "small", tmp_path / "small.calibration"
    theirs.mkdir()
    (theirs / "a.wav").write_bytes(clips[0].audio.read_bytes())
    for speech in (theirs, clips[0].audio.parent):
        refused = saml("quantize", out, "--calibration", speech)
        assert_refused(refused, theirs, "holds a.wav", "move the folder away")
        assert not out.exists()
    result = saml("quantize", out)
    assert result.exit_code == 0, result.output
    assert [path.name for path in theirs.iterdir()] == ["a.wav"]


def test_a_folder_of_stages_is_taken_and_deleted_alone(tmp_path):
    folder, other = tmp_path / "work", {"w": torch.zeros(2)}
    check_stages(folder)
    write_stage(folder / "fc1.safetensors", "mark", {}, other, {})
    (folder / f".fc2.safetensors.{'0f' * 16}.tmp").write_bytes(b"half")  # of a killed run
    check_stages(folder)
    write_tensors(folder / "mine.safetensors", other, {})
    with pytest.raises(SAMLError, match=r"holds mine\.safetensors"):
        check_stages(folder)
    remove_stages(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.safetensors"]
    (folder / "mine.safetensors").unlink()
    remove_stages(folder)
    assert not folder.exists()
    folder.write_text("a file")
    with pytest.raises(SAMLError, match="expected a folder"):
        check_stages(folder)


def test_the_folder_one_is_in(tmp_path, monkeypatch, clips):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert checkpoint_of(Path(".")) == tmp_path / "here.checkpoint"
    result = saml("quantize", ".")
    assert result.exit_code == 0, (result.output, result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert saml("transcribe", clips[0].audio, "--model", here).stdout


def test_calibration_is_refused_before_any_work(tmp_path, clips):
    out = tmp_path / "small"
    assert_refused(saml("quantize", out, "--seed", 1), "--calibration")
    assert_refused(saml("quantize", out, "--calibration", tmp_path / "none"), "none")
    samples = np.zeros(8000, dtype=np.float32)
    (tmp_path / "short").mkdir()
    soundfile.write(tmp_path / "short" / "a.wav", samples, 16000)
    assert_refused(saml("quantize", out, "--calibration", tmp_path / "short"), "1 to 30 s")
    assert not out.exists()


def test_pretrain_writes_experts_that_adapt_starts_from(tmp_path, manifest):
    small = SAMLConfig(num_experts=2, rank=2)
    experts, out = tmp_path / "experts.safetensors", tmp_path / "ann.safetensors"
    size = ("--num-experts", 2, "--rank", 2)
    result = saml("pretrain", "--data", manifest, "--out", experts, "--epochs", 1, *size)
    assert result.exit_code == 0, result.output
    assert "learnt from 1 speakers, 2 utterances" in result.stdout
    result = saml(
        *("adapt", "--data", manifest, "--out", out, "--experts", experts),
        *("--epochs", 1, "--adapt-utterances", 1, "--learning-rate", 1e-4),
    )
    assert result.exit_code == 0, result.output
    assert "from 1 utterances" in result.stdout
    found, start = SpeakerProfile.load(out), SpeakerProfile.load(experts)
    assert found.weight_hash == start.weight_hash and found.hash != start.hash
    assert pretrained.profile_config(found) == small


def test_pretrain_goes_on_from_a_quantised_folder(tmp_path, manifest):
    small, experts = tmp_path / "small", tmp_path / "experts.safetensors"
    result = saml("quantize", small)
    assert result.exit_code == 0, result.output
    common = ("pretrain", "--model", small, "--data", manifest, "--out", experts, "--epochs", 1)
    assert_refused(saml(*common, "--rank", 2), "has experts")
    assert_refused(saml(*common, "--teacher", 0.5), "--original")
    assert_refused(saml(*common, "--original", small), "at full precision")
    plain = ("pretrain", "--data", manifest, "--out", experts)
    assert_refused(saml(*plain, "--original", "tiny.en"), "leave it out")
    result = saml(*common, "--original", "tiny.en")
    assert result.exit_code == 0, result.output
    result = saml(*common, "--overwrite")  # without a teacher
    assert result.exit_code == 0, result.output
    start = pretrained.shipped_experts("tiny.en")
    found = SpeakerProfile.load(experts)
    assert start is not None
    assert found.weight_hash == start.weight_hash and found.hash != start.hash
    out = tmp_path / "ann.safetensors"
    result = saml(
        *("adapt", "--model", small, "--data", manifest, "--out", out, "--experts", experts),
        *("--epochs", 1, "--adapt-utterances", 1),
    )
    assert result.exit_code == 0, result.output
