"""Results in a file that a benchmark adds to: what is there is of the same model and speech."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saml_kernels.errors import SAMLError
from saml_models.data.corpora import Utterance
from saml_models.text.wer import word_errors

__all__ = ["check_speech", "resumed", "speech_of"]


def resumed(file: Path, model: str, parts: Sequence[str]) -> dict[str, Any]:
    """What a file holds, or empty results of these parts.

    Raises:
        SAMLError: the results are another model's.
    """
    if not file.exists():
        return {part: {} for part in parts}
    results: dict[str, Any] = json.loads(file.read_text())
    before = results.get("about", {}).get("model", model)
    if before != model:
        raise SAMLError(f"{file}: holds results of {before}, not of {model}; give another file")
    return results


def speech_of(said: Sequence[Utterance]) -> dict[str, list[Any]]:
    """Speaker and number of words of each utterance: what results say of a set."""
    texts = [u.text for u in said]
    return {
        "speakers": [u.speaker for u in said],
        "words": [one.words for one in word_errors(texts, texts)],
    }


def check_speech(results: dict[str, Any], key: str, own: dict[str, list[Any]]) -> None:
    """Note what a set holds.

    Raises:
        SAMLError: what is in the results was heard in other utterances.
    """
    if results["speech"].setdefault(key, own) != own:
        raise SAMLError(
            f"{key}: the results are of other utterances; repeat their data and options, or give "
            "another file"
        )
