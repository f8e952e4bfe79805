"""Figures of `python -m bench rounding`: rates, divergences, and ratios with intervals."""

from __future__ import annotations

from typing import Any

from saml_models.text.wer import over_speakers

__all__ = ["FULL", "HEADS", "mean_kl", "pooled_ratio", "rows", "wer"]

FULL = "full precision"
HEADS = ("variant", "WER to full precision")  # before the sets of speech and after them


def wer(results: dict[str, Any], variant: str, key: str) -> float:
    """Per cent."""
    errors = results["variants"][variant]["sets"][key]["errors"]
    return 100.0 * sum(errors) / sum(results["speech"][key]["words"])


def mean_kl(results: dict[str, Any], variant: str, key: str) -> float:
    """Nats a token."""
    one = results["variants"][variant]["sets"][key]
    return float(sum(one["kl"]) / sum(one["tokens"]))


def pooled_ratio(results: dict[str, Any], variant: str, other: str) -> tuple[float, float, float]:
    """WER of one variant to that of another, its sets pooled, and a 95 % interval over speakers."""
    speakers: list[str] = []
    errors: tuple[list[int], list[int]] = [], []
    for key in counted(results):
        speech = results["speech"][key]
        speakers += [f"{key} {speaker}" for speaker in speech["speakers"]]
        for own, name in zip(errors, (variant, other), strict=True):
            own += results["variants"][name]["sets"][key]["errors"]
    return over_speakers(speakers, *errors)


def counted(results: dict[str, Any]) -> list[str]:
    """The sets whose words are counted; of others there is only KL."""
    return [key for key, speech in results["speech"].items() if speech["words"]]


def has_wer(results: dict[str, Any], variant: str) -> bool:
    """Whether words were counted on every set."""
    sets = results["variants"][variant]["sets"]
    return all("errors" in sets.get(key, {}) for key in counted(results))


def rows(results: dict[str, Any]) -> list[list[str]]:
    """WER and KL by variant and set, and the pooled WER to that of full precision."""
    found = []
    for variant, one in results["variants"].items():
        cells = []
        for key in results["speech"]:
            measured = one["sets"].get(key, {})
            parts = [f"{wer(results, variant, key):.2f}"] if "errors" in measured else []
            parts += [f"{mean_kl(results, variant, key):.4f}"] if "kl" in measured else []
            cells.append(", ".join(parts))
        last = ""
        if variant != FULL and has_wer(results, variant) and has_wer(results, FULL):
            last = "{:.3f} ({:.3f} to {:.3f})".format(*pooled_ratio(results, variant, FULL))
        found.append([variant, *cells, last])
    return found
