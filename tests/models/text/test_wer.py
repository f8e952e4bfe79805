"""Normalisation, word errors and intervals over speakers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from saml_models.text import normalise as normaliser
from saml_models.text.normalise import english_spelling, normalise
from saml_models.text.wer import (
    WordErrors,
    _student,
    over_speakers,
    pooled,
    word_errors,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Quilter's colour, you  know!", "mister quilter is color you know"),
        ("I'm gonna, um, pay twenty-five dollars.", "i am going to pay $25"),
        ("[laughs] It costs £1,000 (or so).", "it costs £1000"),
        ("kinda", "kinda"),  # openai-whisper leaves it; some copies of its rules do not
        ("Café naïve", "cafe naive"),
        ("it 's the apostle of the middle classes", "it is the apostle of the middle classes"),
        ("...", "."),  # openai-whisper's own result, odd as it is
        ("", ""),
    ],
)
def test_whisper_normalisation(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_spelling_table_is_openai_whispers() -> None:
    # SHA-256 of whisper/normalizers/english.json in openai-whisper 20250625.
    digest = "6607f948be9824d2e1b2fa2223cd94c06c45afa4e05ea0e3d5e1f2bdffde2465"
    assert normaliser._SPELLING.sha256 == digest  # what `english_spelling` verifies the file by
    assert english_spelling()["colour"] == "color"


def test_counts_per_utterance() -> None:
    references = ["THE CAT SAT ON THE MAT", "Hello there.", "", "", "um", "colour"]
    hypotheses = ["the cat sit on mat", "hello there", "a b", "", "", "Color!"]
    assert word_errors(references, hypotheses) == [
        WordErrors(substitutions=1, deletions=1, hits=4),
        WordErrors(hits=2),
        WordErrors(insertions=2),
        WordErrors(),
        WordErrors(),
        WordErrors(hits=1),
    ]
    assert word_errors(["we were here"], [""]) == [WordErrors(deletions=3)]
    assert word_errors(["one two three"], ["123"]) == [WordErrors(hits=1)]
    with pytest.raises(ValueError, match="zip"):
        word_errors(["a"], [])


def test_rates_and_pooling() -> None:
    errors = [WordErrors(1, 1, 1, 4), WordErrors(hits=2), WordErrors(insertions=2)]
    total = pooled(errors)
    assert total == WordErrors(1, 1, 3, 6)
    assert (total.words, total.errors, total.wer) == (8, 5, 62.5)
    assert errors[1] + errors[2] == WordErrors(insertions=2, hits=2)
    assert WordErrors().wer == 0.0
    assert math.isinf(errors[2].wer)
    assert pooled([]) == WordErrors()


def test_interval_over_clips_agrees_with_theory() -> None:
    wrong = np.random.default_rng(1).binomial(20, 0.1, size=200).tolist()
    rate, low, high = over_speakers(["one"] * 200, wrong, [20.0] * 200)
    assert low < rate < high
    # 4000 independent words: +-1.96 standard errors of a binomial, 0.93 % on each side.
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.1 * 0.9 / 4000), rel=0.2)


def test_pairing_narrows_the_ratio() -> None:
    # Clips differ far more than the systems do, and both systems share the hard ones.
    rates = np.random.default_rng(0).choice([2.0, 50.0], size=200)
    clips = [str(n) for n in range(200)]
    assert over_speakers(clips, (rates / 2).tolist(), rates.tolist()) == pytest.approx((0.5,) * 3)
    rate, low, high = over_speakers(clips, rates.tolist(), [100.0] * 200)
    assert (high - low) / rate > 0.2


def test_ratio_of_independent_systems_holds_the_truth() -> None:
    one, other = (
        np.random.default_rng(seed).binomial(20, rate, size=200).tolist()
        for seed, rate in ((1, 0.1), (2, 0.2))
    )
    _, low, high = over_speakers([str(n) for n in range(200)], one, other)
    assert 0.3 < low < 0.5 < high < 0.7


def test_bare_words_as_the_authors_count_them() -> None:
    """Hyphens are deleted, digits stay, spelling stays; Whisper's normaliser knows better."""
    said, heard = ["A WELL KNOWN COLOUR OF THE TWENTY"], ["A well-known color of the 20."]
    assert word_errors(said, heard) == [WordErrors(hits=7)]
    (found,) = word_errors(said, heard, "paper")
    assert found == WordErrors(substitutions=3, deletions=1, hits=3)
    assert word_errors(["DON'T"], ["Don't!"], "paper") == [WordErrors(hits=1)]


def test_interval_over_speakers_by_hand() -> None:
    """Three speakers with 1, 2 and 4 errors of 10 words: leaving one out, 6, 5 and 3 of 20."""
    ratio, low, high = over_speakers("aabc", [1.0, 0.0, 2.0, 4.0], [4.0, 6.0, 10.0, 10.0])
    logs = np.log([6 / 20, 5 / 20, 3 / 20])
    spread = math.sqrt(2 / 3 * ((logs - logs.mean()) ** 2).sum())
    assert ratio == pytest.approx(7 / 30)
    assert high / ratio == pytest.approx(ratio / low) == pytest.approx(math.exp(4.303 * spread))
    assert over_speakers(["a", "b"], [1.0, 1.0], [2.0, 2.0]) == (0.5, 0.5, 0.5)
    # Of one voice it is over what was said, of one utterance over nothing.
    said = [1.0, 2.0, 4.0], [10.0, 10.0, 10.0]
    assert over_speakers("aaa", *said) == over_speakers("abc", *said)
    assert over_speakers(["a"], [1.0], [4.0]) == (0.25, 0.25, 0.25)
    # Without whoever erred, no logarithm: half an error more.
    ratio, low, high = over_speakers(["a", "b"], [0.0, 3.0], [10.0, 10.0])
    assert ratio == 0.15 and 0 < low < 0.15 < high < math.inf
    assert over_speakers(["a", "b"], [0.0, 0.0], [10.0, 10.0])[0] == 0.0
    assert over_speakers(["a", "b"], [1.0, 1.0], [0.0, 0.0])[0] == 2.0  # a count of 1 at least
    with pytest.raises(ValueError, match="at least one utterance"):
        over_speakers([], [], [])


def test_student_joins_its_table() -> None:
    assert _student(11) == pytest.approx(2.201, abs=0.003)
    assert _student(39) == pytest.approx(2.023, abs=0.001)


@pytest.mark.parametrize(("speakers", "least"), [(5, 88), (15, 90)])
def test_interval_over_speakers_covers_the_truth(speakers: int, least: int) -> None:
    """Speakers of skewed rates, few of them: 95 % hold the mean in most draws."""
    held = 0
    for seed in range(100):
        rates = np.random.default_rng(seed).gamma(2.0, 0.1, size=speakers)
        names = [str(n) for n in range(speakers)]
        _, low, high = over_speakers(names, (100 * rates).tolist(), [100.0] * speakers)
        held += low <= 0.2 <= high
    assert least <= held <= 99
