"""The four corpus layouts, on real speech, and what is wrong with a broken corpus."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from saml_kernels.errors import SAMLError
from saml_models.data.audio import SAMPLE_RATE, load_audio
from saml_models.data.corpora import Utterance, by_speaker, load_corpora, load_corpus
from saml_models.data.tedlium import clean_text, parse_stm


@pytest.fixture(scope="module")
def librispeech(speech_root: Path) -> Path:
    return speech_root / "LibriSpeech"


@pytest.fixture(scope="module")
def spoken(librispeech: Path) -> list[Utterance]:
    """Six real utterances of two readers."""
    groups = by_speaker(load_corpus(librispeech / "test-other", ["1688", "1998"]))
    return [utterance for group in groups.values() for utterance in group[:3]]


def _refused(path: Path, *parts: str) -> None:
    with pytest.raises(SAMLError) as error:
        load_corpus(path)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# LibriSpeech


def test_librispeech_subset(librispeech: Path) -> None:
    utterances = load_corpus(librispeech / "test-other")
    groups = by_speaker(utterances)
    assert list(groups) == ["1688", "1998", "2033", "2414", "3005", "3080"]
    assert [len(group) for group in groups.values()] == [10] * 6
    ids = [utterance.id for utterance in utterances]
    assert ids == sorted(ids)
    assert utterances[2].id == "1688-142285-0002"
    assert utterances[2].text == "YOU DON'T MEAN THAT YOU THOUGHT ME SO SILLY"
    assert 1.0 < len(utterances[2].load()) / SAMPLE_RATE < 10.0


def test_librispeech_root_and_speaker(librispeech: Path) -> None:
    everything = load_corpus(librispeech)
    subsets = [folder for folder in librispeech.iterdir() if folder.is_dir()]
    assert len(everything) == sum(len(load_corpus(subset)) for subset in subsets)
    alone = load_corpus(librispeech / "test-other" / "2033")
    assert alone == load_corpus(librispeech, ["2033"])
    assert alone == load_corpus(librispeech / "test-other" / "2033" / alone[0].audio.parent.name)


def test_speakers_are_selected_or_named_as_missing(librispeech: Path) -> None:
    chosen = load_corpus(librispeech / "test-other", ["3005", "1688"])
    assert list(by_speaker(chosen)) == ["1688", "3005"]
    with pytest.raises(SAMLError, match=r"no speaker 42, x; it has 6 speakers: 1688, 1998, 2033"):
        load_corpus(librispeech / "test-other", ["x", "1688", "42"])
    with pytest.raises(SAMLError, match=r"speakers: .*, \.\.\.$"):
        load_corpus(librispeech / "train-clean-5", ["42"])


def test_librispeech_broken(spoken: list[Utterance], tmp_path: Path) -> None:
    chapter = tmp_path / "1688" / "142285"
    chapter.mkdir(parents=True)
    transcript = chapter / "1688-142285.trans.txt"
    shutil.copy(spoken[0].audio, chapter)
    transcript.write_text(f"{spoken[0].id} HELLO\n1688-142285-0009 NOT RECORDED\n")
    _refused(tmp_path, f"{transcript}:2", "no audio for 1688-142285-0009")
    transcript.write_text(f"{spoken[0].id} \n")
    _refused(tmp_path, f"{transcript}:1", "no text")
    transcript.write_text(f"{spoken[0].id} HELLO\n{spoken[0].id} AGAIN\n")
    _refused(tmp_path, "used twice", spoken[0].id)


# TED-LIUM 3


@pytest.fixture(scope="module")
def tedlium(spoken: list[Utterance], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release in small: one talk a split, the talk being one reader's utterances in a row."""
    root = tmp_path_factory.mktemp("tedlium") / "TEDLIUM_release-3"
    for split, utterances in (("test", spoken[3:]), ("train", spoken[:3])):
        folder = root / "legacy" / split
        talk = f"Reader{utterances[0].speaker}_2009P"
        for kind in ("sph", "stm"):
            (folder / kind).mkdir(parents=True)
        lines = [";; a comment", f"{talk} 1 inter_segment_gap 0.00 0.50 <o,,unknown> "]
        pause = np.zeros(SAMPLE_RATE // 2, np.float32)
        pieces, now = [pause], 0.5
        for utterance in utterances:
            samples = utterance.load()
            end = now + len(samples) / SAMPLE_RATE
            words = f"{utterance.text.lower()} {{NOISE}} <unk>"
            lines.append(f"{talk} 1 {talk[:-6]} {now:.4f} {end:.4f} <o,f0,male> {words}")
            pieces += [samples, pause]
            now = end + 0.5
        lines.append(
            f"{talk} 1 {talk} 0.0 0.5 <o,f0,male> ignore_time_segment_in_scoring",
        )
        (folder / "stm" / f"{talk}.stm").write_text("\n".join(lines) + "\n")
        soundfile.write(
            folder / "sph" / f"{talk}.sph",
            np.concatenate(pieces),
            SAMPLE_RATE,
            format="NIST",
            subtype="PCM_16",
        )
    return root


def test_tedlium_cuts_the_same_speech(tedlium: Path, spoken: list[Utterance]) -> None:
    train = load_corpus(tedlium / "legacy" / "train")
    assert [utterance.speaker for utterance in train] == ["Reader1688"] * 3
    assert train[0].id.startswith("Reader1688_2009P-0000050-")
    for utterance, original in zip(train, spoken[:3], strict=True):
        assert utterance.text == original.text.lower()
        samples, expected = utterance.load(), original.load()
        assert utterance.duration == pytest.approx(len(expected) / SAMPLE_RATE, abs=1e-3)
        # The written times have four digits: two samples of rounding.
        assert abs(len(samples) - len(expected)) <= 2
        shift = round(utterance.start * SAMPLE_RATE)  # type: ignore[operator]
        assert np.array_equal(samples, load_audio(utterance.audio)[shift : shift + len(samples)])
        shared = min(len(samples), len(expected)) - 2
        near = [np.abs(samples[k : shared + k] - expected[:shared]).max() for k in (0, 1, 2)]
        near.append(np.abs(samples[:shared] - expected[1 : shared + 1]).max())
        assert min(near) == 0.0


def test_tedlium_release_legacy_and_split(tedlium: Path) -> None:
    whole = load_corpus(tedlium)
    assert list(by_speaker(whole)) == ["Reader1998", "Reader1688"]
    assert load_corpus(tedlium / "legacy") == whole
    assert load_corpus(tedlium / "legacy" / "train") == whole[3:]
    # The real release keeps all talks in data/ as well: not counted twice.
    assert load_corpus(tedlium, ["Reader1688"]) == whole[3:]
    (tedlium / "data").mkdir()
    for kind in ("sph", "stm"):
        (tedlium / "data" / kind).symlink_to(tedlium / "legacy" / "train" / kind)
    assert load_corpus(tedlium) == whole
    assert len(load_corpus(tedlium / "data")) == 3


def test_tedlium_talk_without_audio(tedlium: Path, tmp_path: Path) -> None:
    shutil.copytree(tedlium / "legacy" / "train", tmp_path / "train")
    next((tmp_path / "train" / "sph").iterdir()).unlink()
    _refused(tmp_path / "train", "Reader1688_2009P.stm", "no audio for Reader1688_2009P")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("<o,f0,male> i 'd like to share with you", "i'd like to share with you"),
        ("<F0_F> it <sil> 's we {BREATH} 're here", "it's we're here"),
        ("<o,f0,female> the <unk> 's house <unk>", "the house"),
        ("we read(2) it {NOISE} [LAUGH] (AimeeMullins-17.8-28.8)", "we read it"),
        ("<o,,unknown> <unk>", ""),
        ("'cause i said so", "'cause i said so"),
    ],
)
def test_tedlium_text(words: str, text: str) -> None:
    assert clean_text(words) == text


def test_stm_lines_that_are_skipped() -> None:
    lines = [
        ";; comment",
        "",
        "talk 1 inter_segment_gap 0 1 <o,,unknown>",
        "talk 1 talk 1 2 <o,f0,male> ignore_time_segment_in_scoring",
        "talk 1 Ann 2 3 <o,f0,female> {NOISE}",
        "talk 1 Ann 3 3 <o,f0,female> no time at all",
        "talk 1 Ann 3 4.5 <o,f0,female> kept",
    ]
    (segment,) = parse_stm(lines, "talk.stm")
    assert segment == ("talk-0000300-0000450", "talk", "Ann", 3.0, 4.5, "kept")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("talk 1 Ann 2", "4 fields"),
        ("talk 1 Ann two 3 <o> words", "times two and 3"),
        ("talk 1 Ann nan 3 <o> words", "times nan and 3"),
        ("talk 1 Ann 2 inf <o> words", "times 2 and inf"),
        ("../../etc/talk 1 Ann 2 3 <o> words", "plain file name"),
    ],
)
def test_stm_lines_that_are_refused(line: str, reason: str) -> None:
    with pytest.raises(SAMLError, match=r"talk\.stm:2: ") as error:
        list(parse_stm([";;", line], "talk.stm"))
    assert reason in str(error.value)


# Manifest


def _manifest(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_manifest_of_the_shared_speech(speech_root: Path) -> None:
    path = speech_root / "speechocean762" / "test.jsonl"
    utterances = load_corpus(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [utterance.id for utterance in utterances] == [row["id"] for row in rows]
    assert len(by_speaker(utterances)) == 14
    first = utterances[0]
    assert first.duration == pytest.approx(len(first.load()) / SAMPLE_RATE, abs=0.02)
    with pytest.raises(SAMLError, match=r"test\.jsonl.*train\.jsonl"):
        load_corpus(path.parent)


def test_manifest_fields(spoken: list[Utterance], tmp_path: Path) -> None:
    shutil.copy(spoken[0].audio, tmp_path / "a.flac")
    path = _manifest(
        tmp_path,
        {"audio": "a.flac", "text": "one  two", "speaker": 7, "start": 1, "end": 1.5},
        "",
        {"audio": "a.flac", "text": "three", "speaker": "Zoë", "start": 2.5},
        {"audio": str(tmp_path / "a.flac"), "text": "all", "speaker": "Zoë", "id": 9, "sex": "F"},
    )
    one, two, three = load_corpus(path)
    assert one == Utterance("a.flac:1-1.5", "7", "one two", tmp_path / "a.flac", 1.0, 1.5)
    assert len(one.load()) == SAMPLE_RATE // 2
    assert (two.id, two.speaker, two.start, two.end) == ("a.flac:2.5-", "Zoë", 2.5, None)
    assert (three.id, three.duration) == ("9", None)
    assert np.array_equal(three.load(), spoken[0].load())
    assert load_corpus(path, ["Zoë"]) == [two, three]


GOOD = {"audio": "a.flac", "text": "hello", "speaker": "ann"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "text": None}, "no 'text'"),
        ({"audio": "a.flac", "speaker": "ann"}, "no 'text'"),
        ({**GOOD, "text": ""}, "empty 'text'"),
        ({**GOOD, "text": 5}, "bad 'text'"),
        ({"text": "hello", "speaker": "ann"}, "no 'audio'"),
        ({"audio": "a.flac", "text": "hello"}, "no 'speaker'"),
        ({**GOOD, "audio": "gone.flac"}, "gone.flac is not on disk"),
        ({**GOOD, "audio": "a" * 5000}, "is not on disk"),
        ({**GOOD, "audio": "a\0b"}, "is not on disk"),
        ({**GOOD, "start": -1}, "start is -1"),
        ({**GOOD, "start": "1"}, "start is '1'"),
        ({**GOOD, "start": float("nan")}, "start is nan"),
        ({**GOOD, "start": 2, "end": 1}, "end 1 s is not after start 2 s"),
        ('{"audio": "a.flac", ', "bad JSON"),
        ("[" * 100_000, "bad JSON"),
        ('["a.flac", "hello", "ann"]', "one JSON object"),
    ],
)
def test_manifest_rows_that_are_refused(
    spoken: list[Utterance], tmp_path: Path, row: object, reason: str
) -> None:
    shutil.copy(spoken[0].audio, tmp_path / "a.flac")
    path = _manifest(tmp_path, GOOD, row)
    _refused(path, f"{path}:2", reason)


def test_what_a_caller_can_do_without(spoken: list[Utterance], tmp_path: Path) -> None:
    shutil.copy(spoken[0].audio, tmp_path / "a.flac")
    path = _manifest(tmp_path, {"audio": "a.flac", "speaker": "ann"}, {**GOOD, "audio": "b.flac"})
    found = load_corpus(path, need_text=False, need_audio=False)
    assert [(u.id, u.text) for u in found] == [("a.flac", ""), ("b.flac", "hello")]
    with pytest.raises(SAMLError, match=r"b\.flac"):
        found[1].load()
    with pytest.raises(SAMLError, match=r":2: audio .*b\.flac is not on disk"):
        load_corpus(path, need_text=False)
    path.unlink()
    (clip,) = load_corpus(tmp_path, need_text=False)
    assert (clip.text, clip.audio.name) == ("", "a.flac")


def test_manifest_ids_have_to_differ(spoken: list[Utterance], tmp_path: Path) -> None:
    shutil.copy(spoken[0].audio, tmp_path / "a.flac")
    _refused(_manifest(tmp_path, GOOD, GOOD), "used twice", "a.flac")


def test_several_corpora_are_one(spoken: list[Utterance], tmp_path: Path) -> None:
    manifests = []
    for folder, speaker, id in (("one", "ann", "1"), ("two", "bob", "2"), ("three", "ann", "1")):
        (tmp_path / folder).mkdir()
        shutil.copy(spoken[0].audio, tmp_path / folder / "a.flac")
        row = GOOD | {"speaker": speaker, "id": id}
        manifests.append(_manifest(tmp_path / folder, row))
    assert [u.speaker for u in load_corpora(manifests[:2])] == ["ann", "bob"]
    assert [u.speaker for u in load_corpora(manifests[:2], {"ann"})] == ["bob"]
    with pytest.raises(SAMLError, match="leave out: nobody is called 7O1, eve"):
        load_corpora(manifests[:2], {"eve", "bob", "7O1"})
    # What was heard, and who is drawn, goes by ids.
    with pytest.raises(SAMLError, match=r"three.*id '1' is used twice .*one.*three"):
        load_corpora(manifests)


# Clips


def test_clips_of_one_speaker_and_of_several(spoken: list[Utterance], tmp_path: Path) -> None:
    for utterance in spoken:
        folder = tmp_path / utterance.speaker
        folder.mkdir(exist_ok=True)
        name = f"take{utterance.id[-4:]}"
        if utterance is spoken[0]:
            shutil.copy(utterance.audio, folder / f"{name}.flac")
        else:
            soundfile.write(folder / f"{name}.WAV", utterance.load(), SAMPLE_RATE, format="WAV")
        (folder / f"{name}.txt").write_text(f"\ufeff{utterance.text}\r\n", encoding="utf-8")
        (folder / f"._{name}.wav").touch()
    everybody = load_corpus(tmp_path)
    assert [utterance.text for utterance in everybody] == [utterance.text for utterance in spoken]
    assert list(by_speaker(everybody)) == ["1688", "1998"]
    assert everybody[0].id == "1688-take0000"
    for utterance, original in zip(everybody, spoken, strict=True):
        assert np.array_equal(utterance.load(), original.load())
    assert load_corpus(tmp_path / "1998") == everybody[3:]


def test_clips_broken(spoken: list[Utterance], tmp_path: Path) -> None:
    shutil.copy(spoken[0].audio, tmp_path / "one.flac")
    _refused(tmp_path, str(tmp_path / "one.flac"), "expected one.txt")
    (tmp_path / "one.txt").write_text(" \n")
    _refused(tmp_path, str(tmp_path / "one.txt"), "empty")
    (tmp_path / "one.txt").write_bytes(b"caf\xe9")
    _refused(tmp_path, str(tmp_path / "one.txt"), "UTF-8")
    (tmp_path / "one.txt").write_text("hello")
    (tmp_path / "two.txt").write_text("nobody said this")
    _refused(tmp_path, str(tmp_path / "two.txt"), "no audio for this text")
    (tmp_path / "two.txt").unlink()
    shutil.copy(spoken[0].audio, tmp_path / "one.wav")
    _refused(tmp_path, "one.flac, one.txt, one.wav")


def test_paths_that_are_no_corpus(tmp_path: Path) -> None:
    _refused(tmp_path / "none", "no such file or folder", "LibriSpeech")
    _refused(tmp_path, "no transcribed speech found", "manifest")
    (tmp_path / "notes.txt").write_text("hello")
    _refused(tmp_path / "notes.txt", "not a corpus")
    (tmp_path / "none.jsonl").write_text("\n")
    _refused(tmp_path / "none.jsonl", "holds no utterance")


BAD_ROWS = {
    "a number as text": {"text": 5},
    "a blank text": {"text": "  "},
    "end before start": {"start": 2.0, "end": 1.0},
    "an id twice": {"id": "bob-1"},
    "a missing file": {"audio": "nowhere.wav"},
    "no audio named": {"audio": None},
    "times that are text": {"start": "soon"},
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_one_speakers_bad_row_is_that_speakers_fault(tmp_path: Path, fault: str) -> None:
    soundfile.write(tmp_path / "clip.wav", np.zeros(1600, np.float32), 16_000)
    good = {"audio": "clip.wav", "text": "hello"}
    rows = [{**good, "speaker": who, "id": f"{who}-{i}"} for who in ("ann", "bob") for i in (1, 2)]
    rows[3] |= BAD_ROWS[fault]
    path = tmp_path / "people.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SAMLError) as strict:
        load_corpus(path)
    faults: dict[str, str] = {}
    found = load_corpus(path, faults=faults)
    assert [u.id for u in found] == ["ann-1", "ann-2"]
    assert faults == {"bob": str(strict.value)}
    assert "\n" not in faults["bob"] and ("people.jsonl:4" in faults["bob"] or "twice" in fault)


def test_a_row_that_is_nobodys_is_named_by_its_line(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", np.zeros(1600, np.float32), 16_000)
    path = tmp_path / "people.jsonl"
    good = '{"audio": "clip.wav", "text": "hello", "speaker": "ann"}\n'
    path.write_text(good + '{"audio": "clip.wav",\n[1]\n{"audio": "clip.wav", "text": "x"}\n')
    faults: dict[str, str] = {}
    assert [u.speaker for u in load_corpus(path, faults=faults)] == ["ann"]
    assert list(faults) == [f"{path}:{n}" for n in (2, 3, 4)]
    assert "bad JSON" in faults[f"{path}:2"] and "speaker" in faults[f"{path}:4"]


def test_other_layouts_keep_faults_with_their_speaker_too(tmp_path: Path) -> None:
    for who in ("ann", "bob"):
        (tmp_path / who).mkdir()
        soundfile.write(tmp_path / who / "clip.wav", np.zeros(1600, np.float32), 16_000)
        (tmp_path / who / "clip.txt").write_text("hello")
    (tmp_path / "bob" / "clip.txt").write_text(" ")
    faults: dict[str, str] = {}
    assert [u.speaker for u in load_corpus(tmp_path, faults=faults)] == ["ann"]
    assert list(faults) == ["bob"] and "empty" in faults["bob"]
    chapter = tmp_path / "LibriSpeech" / "set" / "7" / "1"
    chapter.mkdir(parents=True)
    (chapter / "7-1.trans.txt").write_text("7-1-0000 WORDS\n")
    other = tmp_path / "LibriSpeech" / "set" / "8" / "1"
    other.mkdir(parents=True)
    (other / "8-1.trans.txt").write_text("8-1-0000 WORDS\n")
    soundfile.write(other / "8-1-0000.flac", np.zeros(1600, np.float32), 16_000)
    faults = {}
    found = load_corpus(tmp_path / "LibriSpeech", faults=faults)
    assert [u.speaker for u in found] == ["8"] and list(faults) == ["7"]
    for kind in ("sph", "stm"):
        (tmp_path / "ted" / "train" / kind).mkdir(parents=True)
    talk = tmp_path / "ted" / "train" / "stm" / "talk.stm"
    talk.write_text("no line of this kind\n")
    faults = {}
    assert load_corpus(tmp_path / "ted", faults=faults) == [] and list(faults) == [str(talk)]
