"""Figures of `python -m bench defaults`: pooled rates, ratios over speakers, who was made worse."""

from __future__ import annotations

from typing import Any

from bench.accuracy.over_speakers import made_worse, ratio
from saml_models.text.wer import WordErrors, word_errors

__all__ = ["HEADS", "counted", "rows"]

HEADS = (
    "variant",
    "voices",
    "experts",
    "adapted",
    "to the experts",
    "to another's",
    "to the first variant",
    "made worse",
)

Counts = list[WordErrors]


def counted(results: dict[str, Any], variant: str, key: str, kind: str) -> list[Counts]:
    """Word errors of each utterance, in order, of each seed that was heard to the end.

    Args:
        results: of the bench.
        variant: its name.
        key: the set of voices.
        kind: "experts", "adapted" or "other".
    """
    speech = results["speech"][key]
    said = [text for fold in speech for text in fold["said"]]
    found = []
    for system, folds in results["variants"][variant]["heard"].get(key, {}).items():
        if system.split(" ")[0] == kind and len(folds) == len(speech):
            found.append(word_errors(said, [text for fold in folds for text in fold]))
    return found


def speakers(results: dict[str, Any], key: str) -> list[str]:
    """Of each utterance."""
    return [fold["speaker"] for fold in results["speech"][key] for _ in fold["said"]]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """A row for each variant and set; seeds are pooled, ratios are of the same utterances."""
    found = []
    first = next(iter(results["variants"]), "")
    for variant, one in results["variants"].items():
        for key in one["heard"]:
            owners = speakers(results, key)
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
                    _rate(alone),
                    _rate(own),
                    _ratio(owners, own, alone),
                    _ratio(owners, own, other),
                    "" if variant == first else _ratio(owners, own, before),
                    _worse(owners, own, alone),
                ]
            )
    return found


def _rate(runs: list[Counts]) -> str:
    total = sum((one for run in runs for one in run), start=WordErrors())
    return f"{total.wer:.2f}" if runs else ""


def _errors(runs: list[Counts]) -> list[float]:
    """Of each utterance, mean over seeds."""
    return [sum(one.errors for one in same) / len(same) for same in zip(*runs, strict=True)]


def _ratio(owners: list[str], runs: list[Counts], others: list[Counts]) -> str:
    if not runs or not others:
        return ""
    return ratio(owners, _errors(runs), _errors(others))


def _worse(owners: list[str], own: list[Counts], alone: list[Counts]) -> str:
    if not own or not alone:
        return ""
    return made_worse(owners, _errors(own), _errors(alone))
