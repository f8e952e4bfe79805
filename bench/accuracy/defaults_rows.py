"""Figures of `python -m bench defaults`: pooled rates, ratios over speakers, who was made worse."""

from __future__ import annotations

from typing import Any

from bench.accuracy.over_speakers import made_worse, ratio

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
    """A row for each variant and set; seeds are pooled, ratios are of the same utterances."""
    found = []
    first = next(iter(results["variants"]), "")
    for variant, one in results["variants"].items():
        for key in one["heard"]:
            speech = results["speech"][key]
            owners, words = speech["speakers"], sum(speech["words"])
            alone, own, other, before = (
                counted(results, name, key, kind)
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
                    key,
                    _rate(alone, words),
                    _rate(own, words),
                    _ratio(owners, own, alone),
                    _ratio(owners, own, other),
                    "" if variant == first else _ratio(owners, own, before),
                    _worse(owners, own, alone),
                    str(loops(results, variant, key)),
                ]
            )
    return found


def _rate(runs: Runs, words: int) -> str:
    return f"{100 * sum(_mean(runs)) / words:.2f}" if runs else ""


def _mean(runs: Runs) -> list[float]:
    """Of each utterance, over seeds."""
    return [sum(same) / len(same) for same in zip(*runs, strict=True)]


def _ratio(owners: list[str], runs: Runs, others: Runs) -> str:
    if not runs or not others:
        return ""
    return ratio(owners, _mean(runs), _mean(others))


def _worse(owners: list[str], own: Runs, alone: Runs) -> str:
    if not own or not alone:
        return ""
    return made_worse(owners, _mean(own), _mean(alone))
