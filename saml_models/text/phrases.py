"""A person's own words: names and terms that a recogniser should know how to write."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from saml_kernels.errors import SAMLError

__all__ = ["LARGEST", "LONGEST", "MOST", "Phrases", "checked_phrases", "phrases_of", "read_phrases"]

Phrases = str | os.PathLike[str] | Sequence[str]
"""A file with one phrase a line, or the phrases."""

LARGEST = 256 << 10  # bytes of a file
MOST = 2000  # phrases
LONGEST = 100  # characters of one


def phrases_of(given: Phrases) -> list[str]:
    """The phrases of a file, or those that are given.

    Raises:
        SAMLError: as `read_phrases` and `checked_phrases`.
    """
    if isinstance(given, str | os.PathLike):
        return read_phrases(Path(given))
    return checked_phrases(given, "own words")


def read_phrases(path: Path) -> list[str]:
    """One phrase a line, in UTF-8; empty lines and repetitions are left out.

    Raises:
        SAMLError: the file cannot be read, is too large or no UTF-8, or as `checked_phrases`.
    """
    try:
        with open(path, "rb") as file:
            found = file.read(LARGEST + 1)
    except OSError as error:
        raise SAMLError(f"{path}: cannot be read ({error.strerror}); give a text file") from error
    if len(found) > LARGEST:
        raise SAMLError(f"{path}: over {LARGEST} bytes; expected names and terms, one a line")
    try:
        text = found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SAMLError(
            f"{path}: is no UTF-8 text; expected names and terms, one a line"
        ) from error
    return checked_phrases(text.splitlines(), str(path))


def checked_phrases(phrases: Iterable[str], source: str) -> list[str]:
    """Phrases with single spaces between their words, each once, in the order given.

    Args:
        phrases: names and terms; empty ones are left out.
        source: where they come from, for errors.

    Raises:
        SAMLError: there are none or more than `MOST`, one is longer than `LONGEST` characters, has
            no letter or digit, or a control character in it.
    """
    kept: dict[str, None] = {}
    for number, given in enumerate(phrases, start=1):
        phrase = " ".join(str(given).split())
        if not phrase:
            continue
        if len(phrase) > LONGEST:
            raise SAMLError(
                f"{source}: phrase {number} has {len(phrase)} characters; expected at most "
                f"{LONGEST}, a name or a term"
            )
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in phrase):
            raise SAMLError(f"{source}: phrase {number} has a control character; remove it")
        if not any(c.isalnum() for c in phrase):
            raise SAMLError(f"{source}: phrase {number}, {phrase!r}: has no letter or digit")
        kept[phrase] = None
        if len(kept) > MOST:
            raise SAMLError(f"{source}: over {MOST} phrases; keep those that are often misheard")
    if not kept:
        raise SAMLError(f"{source}: holds no words; give names and terms, one a line")
    return list(kept)
