"""Long recordings are cut at their pauses; nothing is lost or heard twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from saml_models.data.corpora import Utterance, load_corpus
from saml_models.data.pauses import FRAME, LONGEST, SHORTEST, cut_at_pauses, quietest_places

RATE = 16000


def spoken(seconds: float, pauses: list[float]) -> np.ndarray:
    """Noise with half a second of silence around each pause."""
    clip = np.random.default_rng(0).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)
    for at in pauses:
        clip[int((at - 0.25) * RATE) : int((at + 0.25) * RATE)] = 0
    return clip


def test_cuts_lie_in_the_pauses() -> None:
    pauses = [9.0, 21.0, 36.0, 50.0]
    found = [place / RATE for place in quietest_places(spoken(60, pauses))]
    assert len(found) == 4
    assert all(abs(a - b) <= 0.25 for a, b in zip(found, pauses, strict=True))


@pytest.mark.parametrize("seconds", [0.0, 0.01, 19.9, 20.1, 31.0, 200.0])
def test_pieces_are_neither_short_nor_long(seconds: float) -> None:
    clip = spoken(seconds, [])
    places = quietest_places(clip)
    lengths = np.diff([0, *places, len(clip)]) / RATE
    assert all(SHORTEST <= length <= LONGEST for length in lengths[:-1])
    assert 0 <= lengths[-1] <= LONGEST + FRAME / RATE


def test_pieces_are_the_recording(tmp_path: Path) -> None:
    clip = spoken(47.3, [11.0, 25.0])
    soundfile.write(tmp_path / "talk.flac", clip, RATE)
    (recording,) = load_corpus(tmp_path / "talk.flac", need_text=False)
    for one in (recording, Utterance("talk", "me", "a", Path("talk"), samples=clip)):
        pieces = cut_at_pauses(one)
        assert len({piece.id for piece in pieces}) == len(pieces) >= 3
        assert not any(piece.text for piece in pieces)
        loaded = [piece.load() for piece in pieces]
        assert sum(map(len, loaded)) == len(clip)
        np.testing.assert_allclose(np.concatenate(loaded), clip, atol=1e-4)
    short = Utterance("s", "me", "a", Path("s"), samples=clip[: 30 * RATE])
    assert cut_at_pauses(short) == [short]
