"""Speech for the demo, without a network."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import soundfile

from saml_kernels import SAMLError
from saml_models.data import demo_speech as speech
from saml_models.data.corpora import load_corpus


def prompt(folder, name, seconds):
    noise = np.random.default_rng(0).normal(0, 0.1, int(8000 * seconds))
    soundfile.write(folder / f"{name}.wav", noise, 8000)


def test_prompts_with_sound_and_words_become_clips(tmp_path):
    sounds, clips = tmp_path / "sounds", tmp_path / "clips"
    sounds.mkdir()
    clips.mkdir()
    lines = [
        "; a comment line with a few words",
        "good: Please enter your number now.",
        "short: Hello.",
        "beep: [this is a simple beep tone]",
        "silent-one: There is no sound for this.",
        "brief: This one lasts not long.",
        "more: Another prompt of enough words.",
    ]
    (sounds / "core-sounds-en.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name, seconds in (("good", 2), ("short", 2), ("beep", 2), ("brief", 0.5), ("more", 2)):
        prompt(sounds, name, seconds)
    speech._lay_out(sounds, clips, "en")
    assert [(u.id.removeprefix("clips-"), u.text) for u in load_corpus(clips)] == [
        ("good", "Please enter your number now."),
        ("more", "Another prompt of enough words."),
    ]


def test_no_source_at_all_is_one_error(monkeypatch):
    def fail(cache):
        raise SAMLError("closed")

    monkeypatch.setattr(speech, "mini_librispeech", fail)
    monkeypatch.setattr(speech, "asterisk_prompts", fail)
    with pytest.raises(SAMLError, match="no speech to learn from: closed; closed; give --data"):
        speech.demo_speech(None)


def test_a_given_folder_is_used(speech_root):
    found, source = speech.demo_speech(str(speech_root / "LibriSpeech" / "train-clean-5"))
    assert len(found) >= 30 and len({u.speaker for u in found}) == 1
    assert source.endswith("train-clean-5")
