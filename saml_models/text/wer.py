"""Word error rates: counts per utterance, intervals over speakers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import jiwer
import numpy as np
import numpy.typing as npt

from saml_models.text.normalise import SCORINGS

__all__ = ["WordErrors", "over_speakers", "pooled", "word_errors"]


@dataclass(frozen=True)
class WordErrors:
    """Counts of an alignment of words; add two to pool them."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    hits: int = 0

    @property
    def words(self) -> int:
        """Number of words of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Word error rate in per cent; infinite for insertions into an empty reference."""
        if self.words == 0:
            return float("inf") if self.errors else 0.0
        return 100.0 * self.errors / self.words

    def __add__(self, other: WordErrors) -> WordErrors:
        """Counts of two utterances together."""
        return WordErrors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.hits + other.hits,
        )


def word_errors(
    references: Sequence[str], hypotheses: Sequence[str], scoring: str = "whisper"
) -> list[WordErrors]:
    """Count word errors per utterance, both sides normalised.

    An empty reference counts every word heard as an insertion, an empty hypothesis every word said
    as a deletion.

    Args:
        references, hypotheses: a text for each utterance.
        scoring: of `SCORINGS`.

    Raises:
        ValueError: not as many hypotheses as references.
    """
    result, words = [], SCORINGS[scoring]
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        counts = jiwer.process_words(words(reference), words(hypothesis))
        result.append(
            WordErrors(counts.substitutions, counts.deletions, counts.insertions, counts.hits)
        )
    return result


def pooled(errors: Iterable[WordErrors]) -> WordErrors:
    """Add up the counts of many utterances, so that every word weighs the same."""
    return sum(errors, start=WordErrors())


def over_speakers(
    speakers: Sequence[str], amounts: Sequence[float], counts: Sequence[float]
) -> tuple[float, float, float]:
    """sum(amounts) / sum(counts), and its 95 % interval over speakers.

    Jackknife: each speaker is left out in turn, with all that they say; the logarithm of the ratio
    is taken to follow Student's t. Of five or six speakers a bootstrap would say too much. Of one
    speaker it is each utterance that is left out: the interval is of this voice, and says nothing
    of others. Of one utterance it has no width.

    Args:
        speakers: of each utterance, as are the others.
        amounts: errors of a system, or another sum.
        counts: words, or errors of another system on the same utterances. A sum of them below 1
            counts as 1. Where somebody makes all the errors, half an error is added to both sums
            for the interval.

    Raises:
        ValueError: no utterance.

    Source: Tukey's jackknife (Efron and Tibshirani, "An introduction to the bootstrap", 1993,
    chapters 11 and 12).
    """
    rows: dict[str | int, npt.NDArray[np.float64]] = {}
    owners: Sequence[str | int] = speakers if len(set(speakers)) > 1 else range(len(speakers))
    for owner, *row in zip(owners, amounts, counts, strict=True):
        rows[owner] = rows.get(owner, np.zeros(2)) + np.array(row)
    if not rows:
        raise ValueError("over_speakers: needs at least one utterance")
    table = np.array(list(rows.values()))
    total, n = table.sum(axis=0), len(table)
    ratio = float(total[0] / max(total[1], 1))
    if n == 1:
        return ratio, ratio, ratio
    without = total - table
    more = 0.5 if min(without.min(), total.min()) <= 0 else 0.0
    logs = np.log(without[:, 0] + more) - np.log(without[:, 1] + more)
    spread = math.sqrt((n - 1) / n * float(((logs - logs.mean()) ** 2).sum()))
    centre = (total[0] + more) / (total[1] + more)
    factor = math.exp(_student(n - 1) * spread)
    return ratio, min(ratio, float(centre / factor)), float(centre * factor)


# 97.5 % of Student's t, for 1 to 10 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _student(freedom: int) -> float:
    """97.5 % of Student's t; above the table by its expansion (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
