"""The command line: what works, and what bad input leaves behind (one line, exit code 2)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from command_line import assert_refused, bad_audio, full_disk, saml

from saml_models import recogniser
from saml_models.compress import loading as compress_loading
from saml_models.speakers import pretrained
from saml_models.speakers.profile import SpeakerProfile


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "nan"])
def test_bad_audio(tmp_path, clips, kind):
    path, out = bad_audio(tmp_path, kind), tmp_path / "out"
    # The good file before it must not be transcribed in vain, nor leave anything.
    assert_refused(saml("transcribe", clips[0].audio, path, "--output_dir", out), path)
    assert not out.exists()


def test_full_disk(tmp_path, model, profile, manifest, clips):
    out = tmp_path / "out"
    with full_disk(16):
        result = saml("transcribe", clips[0].audio, "--output_dir", out)
    assert result.exit_code == 2 and not list(out.iterdir())
    assert len(result.stderr.splitlines()) == 1 and "cannot be written" in result.stderr

    target = tmp_path / "ann.safetensors"
    target.write_text("old")
    learn = ("adapt", "--model", model, "--data", manifest, "--out", target, "--epochs", 1)
    with full_disk(4096):
        result = saml(*learn, "--overwrite")
    assert_refused(result, target, "cannot be written")
    assert target.read_text() == "old"

    with full_disk(1 << 20):
        result = saml("quantize", tmp_path / "small", "--experts", profile)
    assert_refused(result, "cannot be written")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ann.safetensors", "out"]


def test_transcribe_writes_what_was_asked_for(tmp_path, profile, clips, monkeypatch):
    # The model by name: its layers are made to fit the profile.
    monkeypatch.chdir(tmp_path)
    paths = [u.audio for u in clips]
    result = saml("transcribe", *paths, "--speaker", profile, "--output_format", "json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{p.stem}.json" for p in paths)
    for line, path in zip(result.stdout.splitlines(), paths, strict=True):
        found = json.loads((tmp_path / f"{path.stem}.json").read_text())
        assert line == f"{path}\t{found['text']}"
        assert found["speaker_hash"] == SpeakerProfile.load(profile).hash


def test_transcribe_prints_text_alone_and_writes_nothing_unasked(tmp_path, clips, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speech").mkdir()
    samples, rate = soundfile.read(clips[0].audio)
    soundfile.write(tmp_path / "speech" / "one.WAV", samples, rate)
    result = saml("transcribe", "speech")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1 and len(result.stdout.split()) > 2
    assert [p.name for p in tmp_path.rglob("*")] == ["speech", "one.WAV"]


def test_transcribe_refuses_what_it_cannot_write_apart(tmp_path, clips):
    twin = tmp_path / clips[0].audio.name
    twin.write_bytes(clips[0].audio.read_bytes())
    result = saml("transcribe", twin, clips[0].audio, "--output_dir", tmp_path)
    assert_refused(result, twin, "same name")
    assert_refused(saml("transcribe", twin, "--output_format", "docx"), "docx")
    assert_refused(saml("transcribe", twin, "--output_dir", twin), "is a file")
    (tmp_path / "none").mkdir()
    assert_refused(saml("transcribe", tmp_path / "none"), "no audio")


def test_speakers_show_and_doctor(profile):
    shown = saml("speakers", "show", profile)
    assert shown.exit_code == 0
    assert "ann" in shown.stdout and SpeakerProfile.load(profile).hash in shown.stdout
    assert_refused(saml("speakers", "show", profile.with_name("nobody")), "nobody", "no such file")

    found = saml("doctor")
    assert found.exit_code == 0
    for row in ("python", "torch", "cpu backend", "triton", "model tiny.en", "model cache"):
        assert f"\n{row} " in f"\n{found.stdout}"


def test_help_does_not_wait_for_the_heavy_libraries():
    code = (
        "import sys, saml_models.cli.main; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


def test_bench_times_and_writes(tmp_path):
    out = tmp_path / "bench.json"
    options = ("--width", 64, "--tokens", "1,7", "--rounds", 1, "--device", "cpu", "--json", out)
    result = saml("bench", "--work", "P3", *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["works"]["P3"]["rows"]
    ours = [r for r in rows if r["contender"] == "saml + experts"]
    assert [(r["m"], r["n"], r["k"]) for r in ours[:3]] == [(1, 64, 64), (7, 64, 64), (1, 256, 64)]
    assert len(ours) == 6 and all(r["median_us"] > 0 and r["ratios"]["dense"] > 0 for r in ours)
    assert f"written: {out}" in result.stdout and "GPU rows: not run" in result.stdout
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_bench_refuses():
    assert_refused(saml("bench", "--tokens", "1,x"), "--tokens 1,x", "expected positive integers")
    assert_refused(saml("bench", "--work", "P7"), "--work P7", "P1, P2")
    assert_refused(saml("bench", "--cpu-level", "MMX"), "--cpu-level MMX", "AVX2")
    assert_refused(saml("bench", "--tune", "--device", "cpu"), "bench --tune")


def test_transcripts_are_never_replaced_unasked(tmp_path, monkeypatch, clips):
    own = tmp_path / "clip.wav"
    soundfile.write(own, clips[0].load(), 16000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recogniser, "load_for_speakers", None)  # refused before anything is loaded
    for kind in ("txt", "srt", "vtt", "json", "tsv"):
        text = tmp_path / f"clip.{kind}"
        text.write_text("corrected by hand")
        for asked in (("--output_format", kind), ("--output_dir", "."), ("--output_format", "all")):
            assert_refused(saml("transcribe", own, *asked), f"clip.{kind}", "--overwrite")
        assert text.read_text() == "corrected by hand"
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["clip.wav", text.name])
        text.unlink()


def test_overwrite_replaces_a_transcript(tmp_path, clips):
    own, text = tmp_path / "clip.wav", tmp_path / "clip.txt"
    soundfile.write(own, clips[0].load(), 16000)
    text.write_text("old")
    where = ("--output_format", "txt", "--output_dir", tmp_path)
    result = saml("transcribe", own, *where, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert text.read_text().strip() == result.stdout.strip() != "old"
    assert_refused(saml("transcribe", own, *where), text)  # it may have been corrected since


def test_other_commands_replace_only_what_they_wrote(tmp_path, manifest, profile, monkeypatch):
    for module, name in (
        (compress_loading, "load_model"),
        (pretrained, "load_adaptable"),
        (pretrained, "load_for_speakers"),
    ):
        monkeypatch.setattr(module, name, None)
    diary = tmp_path / "diary"
    diary.write_text("dear diary")
    for command in (
        ("adapt", "--data", manifest, "--out", diary),
        ("pretrain", "--data", manifest, "--out", diary),
        ("evaluate", "--data", manifest, "--json", diary),
        ("evaluate", "--data", manifest, "--figure", diary),
        ("quantize", diary),
        ("speakers", "export", profile, diary),
        ("speakers", "prune", profile, "--data", manifest, "--out", diary),
        ("bench", "--json", diary),
    ):
        assert_refused(saml(*command), diary, "is there already")
    picture = tmp_path / "wer.png"
    picture.write_bytes(b"\x89PNG a holiday")
    refused = saml("evaluate", "--data", manifest, "--json", tmp_path / "wer.json")
    assert_refused(refused, picture)
    folder = tmp_path / "adapters"
    (folder / "expert-0").mkdir(parents=True)
    (folder / "expert-0" / "adapter_config.json").write_text("{}")
    assert_refused(saml("speakers", "export", profile, folder, "--peft"), "expert-0")
    assert_refused(saml("adapt", "--data", manifest, "--out", diary / "a"), "is a file")
    assert diary.read_text() == "dear diary" and picture.read_bytes() == b"\x89PNG a holiday"
    copy = tmp_path / "copy.safetensors"
    for _ in range(2):  # a profile of ours may be written again
        assert saml("speakers", "export", profile, copy).exit_code == 0
    assert saml("speakers", "export", profile, diary, "--overwrite").exit_code == 0
    assert diary.read_bytes() == copy.read_bytes()


def test_a_folder_is_heard_whole_and_what_is_left_out_is_named(tmp_path, clips):
    for kind, more in (("wav", {}), ("aiff", {}), ("opus", {"format": "OGG", "subtype": "OPUS"})):
        soundfile.write(tmp_path / f"{kind}.{kind}", clips[0].load(), 16000, **more)
    (tmp_path / "notes.pdf").write_text("notes")
    result = saml("transcribe", tmp_path)
    assert result.exit_code == 0
    assert [Path(line.split("\t")[0]).name for line in result.stdout.splitlines()] == [
        "aiff.aiff", "opus.opus", "wav.wav",
    ]  # fmt: skip
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"saml: {tmp_path}: left out: notes.pdf")


def test_a_recording_that_is_cut_off_is_transcribed_and_said_once(tmp_path, clips):
    soundfile.write(tmp_path / "whole.wav", clips[0].load(), 16000)
    data = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: len(data) * 7 // 10])
    result = saml("transcribe", tmp_path / "cut.wav")
    assert result.exit_code == 0 and result.stdout.strip()
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"saml: {tmp_path / 'cut.wav'}: ") and "cut off" in line
