"""Two systems on the same utterances, compared over speakers, as a table says it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from saml_models.text.wer import over_speakers

__all__ = ["made_worse", "ratio", "table"]


def ratio(speakers: Sequence[str], errors: Sequence[float], others: Sequence[float]) -> str:
    """Errors of one system to another's, with a 95 % interval: `text.wer.over_speakers`.

    Where it is over the utterances of a single speaker, it says so; of one there is none.

    Args:
        speakers: of each utterance, as are the others.
        errors, others: word errors of both.
    """
    found, low, high = over_speakers(speakers, errors, others)
    if len(speakers) == 1:
        return f"{found:.3f}"
    over = "" if len(set(speakers)) > 1 else ", clips"
    return f"{found:.3f} ({low:.3f} to {high:.3f}{over})"


def made_worse(speakers: Sequence[str], errors: Sequence[float], others: Sequence[float]) -> str:
    """For how many speakers the first makes more errors; arguments as for `ratio`."""
    totals: dict[str, tuple[float, float]] = {}
    for speaker, one, other in zip(speakers, errors, others, strict=True):
        mine, theirs = totals.get(speaker, (0, 0))
        totals[speaker] = mine + one, theirs + other
    return f"{sum(mine > theirs for mine, theirs in totals.values())} of {len(totals)}"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For a terminal; the first two columns say what a row is of."""
    made = Table(title=title)
    for place, head in enumerate(heads):
        made.add_column(head, justify="left" if place < 2 else "right")
    for row in rows:
        made.add_row(*row)
    return made
