"""`saml adapt` and `saml speakers`: what works, what is refused, and what goes on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from command_line import assert_refused, bad_audio, interrupted, saml

from saml_models.speakers.profile import SpeakerProfile


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


def test_interrupted_adaptation_says_where_it_is_and_goes_on(
    tmp_path, model, manifest, monkeypatch
):
    from saml_models.cli import adapt as adapt_command
    from saml_models.training import adapt as adaptation

    options = replace(adaptation.ADAPTATION, max_batch=1, checkpoint_every=1)
    monkeypatch.setattr(adaptation, "ADAPTATION", options)
    out = tmp_path / "ann.safetensors"
    checkpoint = tmp_path / "ann.safetensors.checkpoint"
    steps = interrupted(monkeypatch, adapt_command, after=1)
    command = ("adapt", "--model", model, "--data", manifest, "--out", out, "--epochs", 1)
    assert_refused(saml(*command), checkpoint, "same command", code=130)
    assert list(tmp_path.iterdir()) == [checkpoint]
    assert saml(*command).exit_code == 0
    assert [done for done, *_ in steps] == [1, 2]
    assert list(tmp_path.iterdir()) == [out]


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
