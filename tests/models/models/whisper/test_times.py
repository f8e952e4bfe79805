"""Times of words and cues never go back, lie within the recording, and no word is without any."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saml_models.data.corpora import load_corpus
from saml_models.models.whisper.longform import read_segments
from saml_models.text.transcript import Segment, Transcript
from saml_models.text.writers import render
from saml_models.transcription.recordings import transcribe

VOCABULARY = [" one", " two", " three", " four", "teen", ".", ",", " five"]
MARK = 100  # a time token


class Tokenizer:
    """Words by number; everything from 50 on is a control token."""

    eos_token_id = 50

    def decode(self, ids: list[int]) -> str:
        return "".join(VOCABULARY[i] for i in ids)


def part(start: float, end: float, words: list[int], times: list[float]) -> dict[str, Any]:
    tokens = torch.tensor([MARK, *words, MARK])
    assert len(times) == len(tokens)
    return {
        "start": torch.tensor(start),
        "end": torch.tensor(end),
        "tokens": tokens,
        "token_timestamps": torch.tensor(times),
    }


def read(parts: list[dict[str, Any]], seconds: float = 60.0) -> list[Segment]:
    return read_segments(parts, Tokenizer(), seconds, "en")[1]


def times(segments: list[Segment]) -> list[float]:
    """Of all words, or where there are none of the segments, in order."""
    found = [t for s in segments for w in s.words or [s] for t in (w.start, w.end)]
    assert all(
        s.start == s.words[0].start and s.end == s.words[-1].end for s in segments if s.words
    )
    return found


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(list(found), expected, atol=1e-5)


def spoken(segments: list[Segment]) -> list[tuple[float, float]]:
    return [(w.start, w.end) for s in segments for w in s.words or []]


def rising(values: list[float]) -> bool:
    return all(a <= b for a, b in pairwise(values))


def test_a_segment_starts_where_the_last_word_ended() -> None:
    """The first segment's words are aligned to 2.4 s, and the second's own start is 2.0 s."""
    found = read(
        [
            part(0.0, 2.0, [0, 1], [0.2, 0.9, 2.4, 2.4]),
            part(2.0, 4.0, [2, 3], [2.4, 2.9, 3.5, 3.5]),
        ]
    )
    close([(s.start, s.end) for s in found], [(0.0, 2.4), (2.4, 3.5)])


def test_a_pause_before_a_segment_is_left_out_of_it() -> None:
    found = read(
        [part(0.0, 2.0, [0], [0.0, 1.0, 1.0]), part(5.0, 7.0, [1], [1.0, 5.6, 5.6])],
    )
    close([(s.start, s.end) for s in found], [(0.0, 1.0), (5.0, 5.6)])


def test_words_aligned_past_their_window_end_where_the_next_begins() -> None:
    found = read(
        [
            part(26.0, 28.0, [0, 1, 2], [26.0, 27.0, 28.5, 30.0, 30.0]),
            part(28.0, 30.0, [3], [28.0, 29.0, 29.0]),
        ]
    )
    close(spoken(found), [(26.0, 27.0), (27.0, 27.5), (27.5, 28.0), (28.0, 29.0)])


def test_a_word_without_time_shares_that_of_the_one_before_or_after_it() -> None:
    found = read([part(0.0, 3.0, [0, 1, 2], [0.0, 1.0, 1.0, 1.0, 1.0])])
    close(spoken(found), [(0.0, 0.333), (0.333, 0.667), (0.667, 1.0)])
    found = read([part(0.0, 3.0, [0, 1], [0.0, 0.0, 1.0, 1.0])])
    close(spoken(found), [(0.0, 0.5), (0.5, 1.0)])


def test_nothing_lies_beyond_the_end_of_the_recording() -> None:
    found = read(
        [
            part(0.0, 2.0, [0, 1], [0.0, 1.0, 9.0, 9.0]),
            part(2.0, 3.0, [2], [9.0, 9.5, 9.5]),
            part(4.0, 5.0, [3], [9.5, 9.6, 9.6]),  # heard in the padding
        ],
        seconds=2.5,
    )
    assert [s.text for s in found] == ["one two", "three"]
    assert rising(times(found)) and times(found)[-1] == 2.5


def test_segments_without_words_do_not_go_back_either() -> None:
    parts = [part(0.0, 5.0, [0], [0.0] * 3), part(4.5, 4.8, [1], [0.0] * 3)]
    for one in parts:
        del one["token_timestamps"]
    close(times(read(parts)), [0.0, 5.0, 5.0, 5.0])


@given(
    st.lists(
        st.tuples(
            st.floats(0, 70), st.floats(0, 30), st.lists(st.integers(0, 7), max_size=4),
            st.lists(st.floats(0, 70), min_size=6, max_size=6), st.booleans(),
        ),
        max_size=6,
    )
)  # fmt: skip
def test_whatever_the_model_says(raw: list[Any]) -> None:
    parts = []
    for start, length, words, ends, ordered in raw:
        chosen = sorted(ends) if ordered else ends
        parts.append(part(start, start + length, words, chosen[: len(words) + 2]))
    found = read(parts)
    assert rising(times(found))
    assert all(0 <= t <= 60 for t in times(found))
    for kind, pattern in (("srt", r"(\d+):(\d+):(\d+),(\d+)"), ("tsv", r"^(\d+)\t(\d+)")):
        text = render(Transcript("", "en", 60.0, found), kind)
        clock = [[int(n) for n in m] for m in re.findall(pattern, text, re.MULTILINE)]
        flat = clock if kind == "srt" else [[t] for row in clock for t in row]
        assert len(flat) == 2 * len(found) and flat == sorted(flat)


@pytest.mark.slow
def test_eight_utterances_end_to_end(tiny_en: Any, speech_root: Path) -> None:
    chosen = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1998"])[:8]
    clips = [u.load() for u in chosen]
    found = transcribe(*tiny_en, np.concatenate(clips), word_timestamps=True)
    assert found.duration > 60 and len(found.segments) > 8
    assert rising(times(found.segments)) and times(found.segments)[-1] <= found.duration
    words = [w for s in found.segments for w in s.words]
    assert all(w.end > w.start for w in words)
    # Each utterance's words lie within it: the cues are where they were said.
    edges = np.cumsum([0, *map(len, clips)]) / 16_000
    placed = np.histogram([(w.start + w.end) / 2 for w in words], edges)[0]
    said = [len(u.text.split()) for u in chosen]
    assert all(abs(a - b) <= 4 for a, b in zip(placed, said, strict=True)), (placed, said)
