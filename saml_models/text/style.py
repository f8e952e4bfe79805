"""Training targets in the model's own style.

Corpora come in capitals or lower case without punctuation. Trained on that, a Whisper forgets how
to punctuate, and a few minutes of speech are spent on learning a spelling convention instead of a
voice. So a bare reference borrows case and punctuation from the model's own hypothesis wherever
the two agree, and only its words differ elsewhere.
"""

from __future__ import annotations

import difflib
import re

from saml_models.text.normalise import normalise

__all__ = ["in_model_style", "is_bare"]

_NOT_WORD = re.compile(r"[^\w']")
_CLOSING = ".,?!;:"
_END = re.compile(r"(?<=\w)[.?!]+$")


def is_bare(text: str) -> bool:
    """True for a transcript without case or punctuation: all capitals or all lower case."""
    return text in (text.upper(), text.lower()) and not any(c in _CLOSING for c in text)


def in_model_style(reference: str, hypothesis: str) -> str:
    """The reference's words with the hypothesis's case, punctuation and number style.

    Args:
        reference: what was said; returned as it is unless `is_bare`.
        hypothesis: what the model transcribed, with its own punctuation.

    Returns:
        Text with the words of `reference` as Whisper's English normaliser sees them.
    """
    if not is_bare(reference):
        return reference
    # What ends the hypothesis ends the text, whichever of the last words were heard.
    end = _END.search(hypothesis := hypothesis.rstrip())
    reference_words, model_words = reference.lower().split(), _END.sub("", hypothesis).split()
    keys = [_NOT_WORD.sub("", word.lower()) for word in model_words]
    matcher = difflib.SequenceMatcher(None, reference_words, keys, autojunk=False)
    styled: list[str] = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "insert":
            continue
        words, other = reference_words[i:j], model_words[k:m]
        same = tag == "equal" or (other and _same_words(words, other))
        styled += other if same else _dressed(words, other, first=i == 0)
    if styled and end and styled[-1][-1] not in _CLOSING:
        styled[-1] += end.group()[0]
    # Numbers and abbreviations can read otherwise in other company: then no style is borrowed.
    return " ".join(styled if _same_words(styled, reference_words) else reference_words)


def _same_words(some: list[str], others: list[str]) -> bool:
    return normalise(" ".join(some)) == normalise(" ".join(others))


def _dressed(words: list[str], other: list[str], first: bool) -> list[str]:
    """Misheard words: the case, word by word, and the closing mark of what was heard instead."""
    models = other if len(other) == len(words) else other[:1]
    capital = [word[0].isupper() for word in models] + [False] * len(words)
    capital[0] = capital[0] or first
    words = [w.capitalize() if c else w for w, c in zip(words, capital, strict=False)]
    if other and other[-1][-1] in _CLOSING:
        words[-1] += other[-1][-1]
    return words
