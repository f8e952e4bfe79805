"""The lists of utterances beside the benchmarks are those that are heard."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.accuracy import speech
from bench.accuracy.speech import VOICES, training_speech
from saml_models.data.corpora import load_corpus


def listed(name: str) -> list[str]:
    return (Path(speech.__file__).parents[1] / "speech" / f"{name}.txt").read_text().split()


@pytest.mark.parametrize("key", VOICES)
def test_voices(key: str, speech_root: Path) -> None:
    voices = VOICES[key]
    found = load_corpus(speech_root / voices.path, voices.speakers)
    assert listed(key) == [u.id for u in found]


def test_training_speech_holds_nobody_who_is_measured(speech_root: Path) -> None:
    found = training_speech(speech_root)
    assert listed("training") == [u.id for u in found]
    assert not {u.id for u in found} & {id for key in VOICES for id in listed(key)}
