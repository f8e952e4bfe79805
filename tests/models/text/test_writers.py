"""Files as openai-whisper writes them, against expectations written by hand."""

import json
import resource
from pathlib import Path

import pytest

from saml_kernels import SAMLError
from saml_models.cli import transcribe
from saml_models.text import writers
from saml_models.text.writers import FORMATS, render, write_transcript
from saml_models.transcription.recordings import Segment, Transcript, Word

TRANSCRIPT = Transcript(
    text="Hello there. Tabs\tand --> arrows, né?",
    language="en",
    duration=3725.5,
    segments=[
        Segment(0, 0.0, 2.5, "Hello there.", [Word(0.1, 0.5, " Hello"), Word(0.5, 2.5, " there.")]),
        Segment(1, 59.9996, 3725.25, "Tabs\tand --> arrows, né?"),
    ],
    speaker_hash="ab12",
)


def test_txt_has_a_line_for_each_segment():
    assert render(TRANSCRIPT, "txt") == "Hello there.\nTabs\tand --> arrows, né?\n"


def test_srt():
    assert render(TRANSCRIPT, "srt") == (
        "1\n00:00:00,000 --> 00:00:02,500\nHello there.\n\n"
        "2\n00:01:00,000 --> 01:02:05,250\nTabs\tand -> arrows, né?\n\n"
    )


def test_vtt_leaves_out_zero_hours():
    assert render(TRANSCRIPT, "vtt") == (
        "WEBVTT\n\n"
        "00:00.000 --> 00:02.500\nHello there.\n\n"
        "01:00.000 --> 01:02:05.250\nTabs\tand -> arrows, né?\n\n"
    )


def test_tsv_is_in_milliseconds_and_has_no_tab_in_the_text():
    assert render(TRANSCRIPT, "tsv") == (
        "start\tend\ttext\n0\t2500\tHello there.\n60000\t3725250\tTabs and --> arrows, né?\n"
    )


def test_json_records_the_speaker_and_words_only_where_there_are_some():
    found = json.loads(render(TRANSCRIPT, "json"))
    assert set(found) == {"text", "language", "duration", "segments", "speaker_hash"}
    assert found["speaker_hash"] == "ab12"
    assert found["segments"][0]["words"][0] == {"start": 0.1, "end": 0.5, "word": " Hello"}
    assert found["segments"][1] == {
        "id": 1,
        "start": 59.9996,
        "end": 3725.25,
        "text": "Tabs\tand --> arrows, né?",
    }


def test_nothing_said_is_still_a_valid_file():
    silent = Transcript("", "en", 1.0, [])
    assert [render(silent, f) for f in ("txt", "srt", "vtt", "tsv")] == [
        "",
        "",
        "WEBVTT\n\n",
        "start\tend\ttext\n",
    ]


def test_all_writes_every_format(tmp_path: Path):
    paths = write_transcript(TRANSCRIPT, tmp_path / "new", "talk")
    assert sorted(p.name for p in paths) == sorted(f"talk.{f}" for f in FORMATS)
    for path in paths:
        assert path.read_bytes().decode() == render(TRANSCRIPT, path.suffix[1:])


def test_all_writes_nothing_if_one_format_does_not_fit_the_disk(tmp_path: Path):
    sizes = sorted(len(render(TRANSCRIPT, f).encode()) for f in FORMATS)
    (tmp_path / "talk.txt").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, hard))  # the largest fails
    try:
        with pytest.raises(SAMLError, match=r"talk\.json: cannot be written"):
            write_transcript(TRANSCRIPT, tmp_path, "talk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["talk.txt"]
    assert (tmp_path / "talk.txt").read_text() == "old"


def test_unknown_format_is_refused(tmp_path: Path):
    with pytest.raises(SAMLError, match="docx"):
        write_transcript(TRANSCRIPT, tmp_path, "talk", "docx")
    assert not list(tmp_path.iterdir())


def test_the_command_offers_what_there_is() -> None:
    assert (*writers.FORMATS, "all") == transcribe.FORMATS
