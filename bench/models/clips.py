"""Which clips of a corpus are heard."""

from __future__ import annotations

from collections.abc import Sequence

from saml_models.data.audio import MAX_SAMPLES
from saml_models.data.corpora import Utterance

__all__ = ["at_once", "spread"]


def at_once(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Those that fit in one window."""
    return [u for u in utterances if len(u.load()) <= MAX_SAMPLES]


def spread(utterances: Sequence[Utterance], count: int) -> list[Utterance]:
    """At most `count` of them, evenly over the corpus."""
    return list(utterances[:: max(1, len(utterances) // count)][:count])
