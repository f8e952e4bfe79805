"""`saml quantize` and `saml pretrain`: what they write, refuse and resume."""

import json

import numpy as np
import soundfile
from command_line import assert_refused, interrupted, saml

from saml_kernels import SAMLConfig
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
