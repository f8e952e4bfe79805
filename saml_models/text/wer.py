"""Word error rates: Whisper's English normaliser, counts per utterance, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import jiwer
import numpy as np
import numpy.typing as npt

from saml_models.text.normalise import SCORINGS

__all__ = [
    "WordErrors",
    "bootstrap_interval",
    "bootstrap_ratio",
    "bootstrap_speakers",
    "pooled",
    "word_errors",
]


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


def bootstrap_interval(
    errors: Sequence[WordErrors], level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of the pooled WER, in per cent, from resampled utterances.

    Args:
        errors: one entry an utterance.
        level: probability that the interval aims to hold, between 0 and 1.
        samples: resamplings.
        seed: of the random numbers; the same seed gives the same interval.

    Raises:
        ValueError: no utterance, or a level or a number of samples out of range.

    Source: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance
    evaluation" (ICASSP 2004).
    """
    counts = np.array([(one.errors, one.words) for one in errors], dtype=np.float64)
    sums = _resampled_sums(counts, samples, seed)
    # A resample may by chance hold only utterances without a word.
    return _quantiles(100.0 * sums[:, 0] / np.maximum(sums[:, 1], 1.0), level)


def bootstrap_ratio(
    a: Sequence[WordErrors],
    b: Sequence[WordErrors],
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of WER(a) / WER(b) for two systems heard on the same utterances.

    Both systems are resampled together, so that hard utterances cancel: below 1 throughout means
    that `a` is better. A resample in which neither errs counts as 1.

    Args:
        a: one entry an utterance.
        b: the other system's, in the same order.
        level: probability that the interval aims to hold, between 0 and 1.
        samples: resamplings.
        seed: of the random numbers; the same seed gives the same interval.

    Raises:
        ValueError: the two do not have the same references, or as `bootstrap_interval`.
    """
    if [one.words for one in a] != [one.words for one in b]:
        raise ValueError("bootstrap_ratio: a and b need the same utterances in the same order")
    counts = np.array([(x.errors, y.errors) for x, y in zip(a, b, strict=True)], dtype=np.float64)
    sums = _resampled_sums(counts, samples, seed)
    ratios = np.full(samples, np.inf)
    np.divide(sums[:, 0], sums[:, 1], out=ratios, where=sums[:, 1] > 0)
    ratios[(sums == 0).all(axis=1)] = 1.0
    return _quantiles(ratios, level)


def bootstrap_speakers(
    speakers: Sequence[str],
    amounts: Sequence[float],
    counts: Sequence[float],
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """sum(amounts) / sum(counts), and its 95 % interval over speakers.

    Speakers are drawn with replacement, with all that they say; the interval is bias-corrected and
    accelerated (BCa), which counts where they are few. Of one speaker it has no width.

    Args:
        speakers: of each utterance, as are the others.
        amounts, counts: both are resampled together; a sum of counts below 1 counts as 1.
        samples, seed: of the bootstrap.

    Raises:
        ValueError: no utterance, or as `bootstrap_interval`.

    Source: Efron, "Better bootstrap confidence intervals" (JASA 1987).
    """
    rows: dict[str, npt.NDArray[np.float64]] = {}
    for speaker, *row in zip(speakers, amounts, counts, strict=True):
        rows[speaker] = rows.get(speaker, np.zeros(2)) + np.array(row)
    table = np.array(list(rows.values()))
    ratio = _ratios(table.sum(axis=0))
    drawn = _ratios(_resampled_sums(table, samples, seed))
    levels = _corrected((0.025, 0.975), ratio, drawn, _ratios(table.sum(axis=0) - table))
    low, high = np.quantile(drawn, levels)
    return float(ratio), float(low), float(high)


def _ratios(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of [..., 2] sums of amounts and of counts."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def _corrected(
    levels: Sequence[float],
    found: npt.NDArray[np.float64],
    drawn: npt.NDArray[np.float64],
    without: npt.NDArray[np.float64],
) -> list[float]:
    """BCa: which quantiles of the draws stand for the levels.

    Args:
        levels: asked for.
        found: the statistic of all.
        drawn: those of the resamplings.
        without: those with each speaker left out.
    """
    normal = NormalDist()
    below = float(np.mean(drawn < found) + np.mean(drawn == found) / 2)
    bias = normal.inv_cdf(min(max(below, 1 / len(drawn)), 1 - 1 / len(drawn)))
    away = without.mean() - without
    spread = float((away**2).sum()) ** 1.5
    bend = float((away**3).sum()) / (6 * spread) if spread > 0 else 0.0
    moved = [bias + normal.inv_cdf(level) for level in levels]
    return [normal.cdf(bias + z / (1 - bend * z)) for z in moved]


def _resampled_sums(
    counts: npt.NDArray[np.float64], samples: int, seed: int
) -> npt.NDArray[np.float64]:
    """Column sums of `counts` [utterances, columns] over resampled rows, [samples, columns]."""
    if len(counts) == 0 or samples < 1:
        raise ValueError("bootstrap: needs at least one utterance and one sample")
    generator = np.random.default_rng(seed)
    picks = (generator.integers(len(counts), size=len(counts)) for _ in range(samples))
    return np.stack([counts[pick].sum(axis=0) for pick in picks])


def _quantiles(values: npt.NDArray[np.float64], level: float) -> tuple[float, float]:
    if not 0.0 < level < 1.0:
        raise ValueError(f"bootstrap: level {level}; expected a probability between 0 and 1")
    tail = (1.0 - level) / 2.0
    # No interpolation between values: one of them may be infinite.
    low, high = np.quantile(values, [tail, 1.0 - tail], method="inverted_cdf")
    return float(low), float(high)
