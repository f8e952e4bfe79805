"""Ratios over speakers, who was made worse: by plain arithmetic."""

from __future__ import annotations

import pytest

from saml_models.evaluation.comparisons import made_worse, rate_interval, ratios
from saml_models.text.wer import WordErrors, over_speakers


def wrong(count: int) -> WordErrors:
    return WordErrors(substitutions=count, hits=10 - count)


ERRORS = {
    "full_precision": [wrong(n) for n in (2, 2, 4, 1)],
    "quantised": [wrong(n) for n in (4, 4, 8, 2)],
    "experts": [wrong(n) for n in (2, 2, 2, 1)],
    "adapted": [wrong(n) for n in (1, 1, 3, 1)],
    "other_speaker": [wrong(n) for n in (0, 0, 0, 0)],
}
SPEAKERS = ["a", "a", "b", "c"]


def test_rates_are_in_per_cent_over_speakers() -> None:
    errors = ERRORS["full_precision"]
    found = rate_interval(SPEAKERS, errors)
    _, low, high = over_speakers("abc", [4, 4, 1], [20, 10, 10])
    assert found == pytest.approx([100 * low, 100 * high], abs=1e-3)
    assert 1 < found[0] < 22.5 < found[1]
    assert rate_interval("aaaa", errors) == rate_interval("abcd", errors)
    # One utterance, and two speakers, say too little.
    assert rate_interval(["a"], errors[:1]) is None and rate_interval("aabb", errors) is None


def test_ratios_are_of_pooled_errors() -> None:
    found = ratios(SPEAKERS, ERRORS)
    assert found["quantised_to_full_precision"] == {"ratio": 2.0, "interval_95": [2.0, 2.0]}
    assert found["adapted_to_experts"]["ratio"] == round(6 / 7, 4)
    low, high = found["adapted_to_experts"]["interval_95"]
    assert 0.1 < low < 6 / 7 < high < 7
    # To no errors at all there is no ratio, nor to what was not run.
    assert "adapted_to_other_speaker" not in found
    assert "adapted_to_experts" not in ratios(SPEAKERS, ERRORS | {"adapted": []})


def test_of_one_speaker_the_interval_is_over_utterances() -> None:
    assert ratios("aaaa", ERRORS) == ratios("abcd", ERRORS)
    found = ratios(["a"], {name: errors[:1] for name, errors in ERRORS.items()})
    assert found["adapted_to_experts"] == {"ratio": 0.5, "interval_95": None}


def test_made_worse_by_speaker() -> None:
    assert made_worse(SPEAKERS, ERRORS) == ["b"]
