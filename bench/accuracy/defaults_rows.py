"""Figures of `python -m bench defaults`: pooled rates, ratios over speakers, who was made worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.accuracy.over_speakers import made_worse, ratio
from bench.accuracy.speech import VOICES

__all__ = ["HEADS", "counted", "loops", "rows"]

HEADS = (
    "variant",
    "voices",
    "experts",
    "adapted",
    "to the experts",
    "to another's",
    "to the first variant",
    "made worse",
    "loops",
)

# Voices with as many utterances to learn from as in the paper: few each, so pooled as well.
TOGETHER = [key for key, voices in VOICES.items() if voices.first == 60]

Runs = list[list[int]]


def counted(results: dict[str, Any], variant: str, key: str, kind: str) -> Runs:
    """Word errors of each utterance, in order, of each seed that was heard to the end.

    Args:
        results: of the bench.
        variant: its name.
        key: the set of voices.
        kind: "experts", "adapted" or "other".
    """
    found = []
    for system, folds in results["variants"][variant]["heard"].get(key, {}).items():
        errors = [count for fold in folds for count in fold["errors"]]
        if system.split(" ")[0] == kind and len(errors) == len(results["speech"][key]["words"]):
            found.append(errors)
    return found


def loops(results: dict[str, Any], variant: str, key: str) -> int:
    """How many utterances ran into a loop after adaptation, of all seeds."""
    heard = results["variants"][variant]["heard"][key]
    own = [folds for system, folds in heard.items() if system.startswith("adapted")]
    return sum(fold["loops"] for folds in own for fold in folds)


def rows(results: dict[str, Any]) -> list[list[str]]:
    """A row for each variant and set, and one for `TOGETHER` where a variant was heard on all.

    Seeds are pooled, ratios are of the same utterances.
    """
    found = []
    first = next(iter(results["variants"]), "")
    for variant, one in results["variants"].items():
        groups = [[key] for key in one["heard"]]
        if all(key in one["heard"] for key in TOGETHER):
            groups.append(TOGETHER)
        for keys in groups:
            owners = [f"{k} {who}" for k in keys for who in results["speech"][k]["speakers"]]
            words = sum(sum(results["speech"][key]["words"]) for key in keys)
            alone, own, other, before = (
                _means(results, name, keys, kind)
                for name, kind in (
                    (variant, "experts"),
                    (variant, "adapted"),
                    (variant, "other"),
                    (first, "adapted"),
                )
            )
            found.append(
                [
                    variant,
                    ", ".join(keys),
                    _rate(alone, words),
                    _rate(own, words),
                    _ratio(owners, own, alone),
                    _ratio(owners, own, other),
                    "" if variant == first else _ratio(owners, own, before),
                    made_worse(owners, own, alone) if own and alone else "",
                    str(sum(loops(results, variant, key) for key in keys)),
                ]
            )
    return found


def _means(results: dict[str, Any], variant: str, keys: Sequence[str], kind: str) -> list[float]:
    """Errors of each utterance of the sets, over seeds; none unless all sets were heard."""
    by_set = [counted(results, variant, key, kind) for key in keys]
    if not all(by_set):
        return []
    return [sum(same) / len(same) for runs in by_set for same in zip(*runs, strict=True)]


def _rate(errors: list[float], words: int) -> str:
    return f"{100 * sum(errors) / words:.2f}" if errors else ""


def _ratio(owners: list[str], errors: list[float], others: list[float]) -> str:
    return ratio(owners, errors, others) if errors and others else ""
