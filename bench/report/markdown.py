"""What every table of a page is made of: results as JSON, and rows as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saml_kernels.errors import SAMLError

__all__ = ["geometric", "markdown_table", "read", "spread"]


def read(path: Path) -> Any:
    """A file of results.

    Raises:
        SAMLError: it is none.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SAMLError(f"{path}: cannot be read as results ({error})") from error


def geometric(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def spread(values: Sequence[float]) -> str:
    """Geometric mean and range, for people."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{geometric(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]
