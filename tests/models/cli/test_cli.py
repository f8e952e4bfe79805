"""The command line: what works, and what bad input leaves behind (one line, exit code 2)."""

import json
import resource
import subprocess
import sys
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from saml_kernels import SAMLConfig
from saml_models import recogniser
from saml_models.cli.main import app
from saml_models.compress import loading as compress_loading
from saml_models.compress.checkpoint import save_saml
from saml_models.compress.shipped_rounding import compress
from saml_models.data.corpora import load_corpus
from saml_models.speakers import pretrained
from saml_models.speakers.profile import SpeakerProfile


def saml(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def assert_refused(result, *parts, code=2):
    """One line on standard error that holds `parts`, nothing on standard output."""
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("saml: "), lines
    for part in parts:
        assert str(part) in lines[0]


@contextmanager
def full_disk(limit):
    """Writes beyond `limit` bytes of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def clips(speech_root):
    """The two shortest utterances of one reader."""
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])
    return sorted(found, key=lambda u: len(u.load()))[:2]


@pytest.fixture(scope="module")
def manifest(clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "voice.jsonl"
    rows = [{"audio": str(u.audio), "text": u.text, "speaker": "ann"} for u in clips]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tiny_en, tmp_path_factory):
    """A saved SAML model, small enough to train in a second."""
    network = deepcopy(tiny_en[0])
    compress(network, SAMLConfig(num_experts=2, rank=2, expert_init="lora"))
    folder = tmp_path_factory.mktemp("model")
    save_saml(network, tiny_en[1], folder)
    return folder


@pytest.fixture(scope="module")
def profile(model, manifest, tmp_path_factory):
    """What `saml adapt` writes."""
    out = tmp_path_factory.mktemp("profiles") / "ann.safetensors"
    result = saml("adapt", "--model", model, "--data", manifest, "--out", out, "--epochs", 1)
    assert result.exit_code == 0, (result.output, result.exception)
    assert [p.name for p in out.parent.iterdir()] == ["ann.safetensors"]
    assert "learnt ann from 2 utterances" in result.stdout
    assert f"written: {out} ({out.stat().st_size:,} bytes" in result.stdout
    return out


def bad_audio(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.wav"
    if kind == "text":
        path.write_text("this is no audio\n" * 100)
    elif kind == "empty":
        soundfile.write(path, np.zeros(0, np.float32), 16000)
    elif kind == "nan":
        soundfile.write(path, np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "nan"])
def test_bad_audio(tmp_path, clips, kind):
    path, out = bad_audio(tmp_path, kind), tmp_path / "out"
    # The good file before it must not be transcribed in vain, nor leave anything.
    assert_refused(saml("transcribe", clips[0].audio, path, "--output_dir", out), path)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "nan"])
def test_adapt_refuses_bad_audio(tmp_path, model, kind):
    path = bad_audio(tmp_path, kind)
    manifest = tmp_path / "data.jsonl"
    manifest.write_text(json.dumps({"audio": path.name, "text": "hello", "speaker": "ann"}))
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "ann.safetensors"
    result = saml("adapt", "--model", model, "--data", manifest, "--out", out)
    assert_refused(result, path.name)
    assert sorted(tmp_path.iterdir()) == before


def test_adapt_refuses_a_row_without_text_and_an_unknown_speaker(tmp_path, clips, manifest):
    out = tmp_path / "ann.safetensors"
    result = saml("adapt", "--data", manifest, "--speaker", "bob", "--out", out)
    assert_refused(result, "bob", "ann")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"audio": str(clips[0].audio), "speaker": "ann"}))
    assert_refused(saml("adapt", "--data", bad, "--out", out), "bad.jsonl:1", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_folder_of_clips_is_enrolled_under_a_name_and_needs_no_text_where_none_is_read(
    tmp_path, clips, monkeypatch
):
    from saml_models.training import pseudo_labels as unsupervised

    folder = tmp_path / "clips"
    folder.mkdir()
    for number, utterance in enumerate(clips[:1] * 5):
        (folder / f"{number}.flac").write_bytes(utterance.audio.read_bytes())
    at = ("--store", tmp_path / "store", "--speaker", "ann")
    assert_refused(saml("adapt", "--data", folder, *at), "no text for this clip")
    asked = {}

    def learn(model, processor, utterances, options, **how):
        asked.update(how, texts=[u.text for u in utterances])
        return SpeakerProfile.of(model, speaker=how["speaker"], utterances=5, seconds=1.0)

    monkeypatch.setattr(unsupervised, "adapt_unsupervised", learn)
    done = saml("adapt", "--data", folder, "--unsupervised", *at)
    assert done.exit_code == 0, (done.output, done.exception)
    assert asked["speaker"] == "ann" and asked["texts"] == [""] * 5
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["ann.safetensors"]
    assert_refused(saml("adapt", "--data", folder, "--ray", *at), "--manifest")
    # A recording beside clips with text: whose it is, is said once.
    assert "known" not in asked
    talk, read = folder / "0.flac", clips[0]
    (folder / "0.txt").write_text(read.text)
    for number in range(1, 5):
        (folder / f"{number}.flac").unlink()
    more = ("adapt", "--data", folder, "--unlabelled", talk)
    assert saml(*more, *at).exit_code == 0
    assert asked["texts"] == [""] and [u.text for u in asked["known"]] == [read.text]
    assert_refused(saml(*more, "--unsupervised", *at), "--unlabelled", "--unsupervised")
    assert_refused(saml("adapt", "--manifest", talk, "--unlabelled", talk), "--unlabelled")


def test_adapt_wants_one_speaker(tmp_path, clips, manifest):
    two = tmp_path / "two.jsonl"
    row = {"audio": str(clips[0].audio), "text": "x", "speaker": "bob", "id": "b"}
    two.write_text(manifest.read_text() + json.dumps(row) + "\n")
    result = saml("adapt", "--data", two, "--out", tmp_path / "x.safetensors")
    assert_refused(result, "2 speakers (ann, bob)", "--speaker")


def test_a_profile_of_another_model(tmp_path, model, profile, clips):
    out, other = tmp_path / "out", tmp_path / "other.safetensors"
    replace(SpeakerProfile.load(profile), weight_hash="0" * 64).save(other)
    clip = clips[0].audio
    for name in (model, "tiny.en"):
        result = saml("transcribe", clip, "--model", name, "--speaker", other, "--output_dir", out)
        assert_refused(result, other, "another model")
    assert not out.exists()
    assert_refused(saml("transcribe", clip, "--speaker", clip), clip)


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


def test_interrupted_adaptation_says_where_it_is_and_goes_on(
    tmp_path, model, manifest, monkeypatch
):
    from saml_models.cli import adapt as adapt_command
    from saml_models.training import adapt as adaptation

    options = replace(adaptation.ADAPTATION, max_batch=1, checkpoint_every=1)
    monkeypatch.setattr(adaptation, "ADAPTATION", options)
    out = tmp_path / "ann.safetensors"
    checkpoint = tmp_path / "ann.safetensors.checkpoint"
    steps = []

    def stop(done, total, note=""):
        steps.append(done)
        if len(steps) == 1:
            raise KeyboardInterrupt

    @contextmanager
    def impatient(label):
        yield stop

    monkeypatch.setattr(adapt_command, "progress", impatient)
    command = ("adapt", "--model", model, "--data", manifest, "--out", out, "--epochs", 1)
    assert_refused(saml(*command), checkpoint, "same command", code=130)
    assert list(tmp_path.iterdir()) == [checkpoint]
    assert saml(*command).exit_code == 0
    assert steps == [1, 2]
    assert list(tmp_path.iterdir()) == [out]


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
    steps = []

    def stop(done, total, note=""):
        steps.append((done, total, note))
        if len(steps) == 5:
            raise KeyboardInterrupt

    @contextmanager
    def impatient(label):
        yield stop

    monkeypatch.setattr(quantize_command, "progress", impatient)
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


def test_import_does_not_replace_another_profile_of_that_name(tmp_path, profile):
    at = ("--store", tmp_path / "store")
    assert saml("speakers", "import", profile, "--name", "ann", *at).exit_code == 0
    assert saml("speakers", "import", profile, "--name", "ann", *at).exit_code == 0
    found = SpeakerProfile.load(profile)
    other = tmp_path / "other.safetensors"
    tensors = {name: value + 1 for name, value in found.tensors.items()}
    replace(found, tensors=tensors).save(other)
    assert_refused(saml("speakers", "import", other, "--name", "ann", *at), "ann", "--overwrite")
    assert SpeakerProfile.load(tmp_path / "store" / "ann.safetensors").hash == found.hash
    assert saml("speakers", "import", other, "--name", "ann", *at, "--overwrite").exit_code == 0


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


def test_one_speakers_bad_rows_do_not_stop_the_others(tmp_path, model, manifest):
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    long = "one two three four " * 150
    good = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows = [{**good[0], "speaker": who, "id": who} for who in ("bob", "cid", "dan", "eve", "fay")]
    rows[0]["text"] = 7
    rows[1] |= {"start": 2.0, "end": 1.0}
    rows[2]["audio"] = str(tmp_path / "missing.wav")
    rows[3]["audio"] = str(tmp_path / "none.wav")
    rows[4]["text"] = long
    people = tmp_path / "people.jsonl"
    lines = [json.dumps(row) for row in (rows[0], *good, *rows[1:])]
    people.write_text("\n".join([*lines[:2], '{"audio": ', *lines[2:]]) + "\n")
    store = tmp_path / "store"
    command = ("adapt", "--manifest", people, "--model", model, "--store", store, "--epochs", 1)
    result = saml(*command)
    assert result.exit_code == 1, (result.output, result.exception)
    report = {one["speaker"]: one for one in json.loads((store / "fleet.json").read_text())}
    assert report.pop("ann")["status"] == "adapted"
    assert [p.name for p in store.glob("*.safetensors")] == ["ann.safetensors"]
    said = {
        "bob": "people.jsonl:1: row has a bad 'text'",
        "cid": "people.jsonl:5: end 1 s is not after start 2 s",
        "dan": "missing.wav: no such file",
        "eve": "none.wav: empty audio",
        "fay": "fay: its text is 603 tokens long",
        f"{people}:3": "bad JSON",
    }
    assert report.keys() == said.keys()
    for speaker, reason in said.items():
        assert report[speaker]["status"] == "failed" and reason in report[speaker]["reason"]
        assert f"{speaker}: failed: {report[speaker]['reason']}\n" in result.stdout
    assert "1 of 7 speakers" in result.stdout
    # One speaker alone, and a test of many, stay strict.
    assert_refused(saml("adapt", "--data", people, "--speaker", "ann"), "people.jsonl:1")
    assert_refused(saml("evaluate", "--data", people), "people.jsonl:1")
    (store / "fleet.json").write_text("[1, 2]")
    assert_refused(saml(*command), "fleet.json", "--overwrite")
