"""What the protocol says of systems: intervals, ratios of errors over speakers, who lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saml_models.text.wer import WordErrors, over_speakers, pooled

__all__ = ["made_worse", "rate_interval", "ratio_interval", "ratios"]

# WER of the first to that of the second, by the name of the ratio.
RATIOS = {
    "quantised_to_full_precision": ("quantised", "full_precision"),
    "experts_to_full_precision": ("experts", "full_precision"),
    "adapted_to_full_precision": ("adapted", "full_precision"),
    "adapted_to_experts": ("adapted", "experts"),
    "adapted_to_other_speaker": ("adapted", "other_speaker"),
}


def rate_interval(speakers: Sequence[str], errors: Sequence[WordErrors]) -> list[float] | None:
    """95 % interval of the pooled word error rate in per cent, of `over_speakers`.

    None of a single utterance, and of two speakers, who say next to nothing of a third.
    """
    if len(speakers) == 1 or len(set(speakers)) == 2:
        return None
    _, *ends = over_speakers(speakers, [e.errors for e in errors], [e.words for e in errors])
    return [round(100 * end, 3) for end in ends]


def ratio_interval(
    speakers: Sequence[str], errors: Sequence[WordErrors], others: Sequence[WordErrors]
) -> list[float] | None:
    """95 % interval of the ratio of two systems' errors, of `over_speakers`.

    None of a single utterance.
    """
    if len(speakers) == 1:
        return None
    amounts, counts = ([e.errors for e in own] for own in (errors, others))
    _, *ends = over_speakers(speakers, amounts, counts)
    return [round(end, 4) for end in ends]


def ratios(
    speakers: Sequence[str], errors: Mapping[str, Sequence[WordErrors]]
) -> dict[str, dict[str, Any]]:
    """Ratios of pooled word error rates, with their `ratio_interval`.

    Args:
        speakers: of each utterance.
        errors: by system, of each utterance; systems that were not run have none.

    Returns:
        By `RATIOS`: "ratio", and "interval_95", None for a single utterance; nothing where the
        second system made no error.
    """
    found = {}
    for name, (one, other) in RATIOS.items():
        mine, theirs = (pooled(errors[system]).errors for system in (one, other))
        if not errors[one] or not theirs:
            continue
        found[name] = {
            "ratio": round(mine / theirs, 4),
            "interval_95": ratio_interval(speakers, errors[one], errors[other]),
        }
    return found


def made_worse(speakers: Sequence[str], errors: Mapping[str, Sequence[WordErrors]]) -> list[str]:
    """The speakers with more errors after adaptation than with the experts alone."""
    lost = []
    for speaker in dict.fromkeys(speakers):
        before, after = (
            pooled(e for s, e in zip(speakers, errors[system], strict=True) if s == speaker).errors
            for system in ("experts", "adapted")
        )
        if after > before:
            lost.append(speaker)
    return lost
