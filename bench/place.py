"""Where this clone lies, and how a part of the benchmark is started in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["NOT_RUN", "REPOSITORY", "RESULTS", "as_module", "environment"]

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"
NOT_RUN = 3  # exit code of a part that cannot run here


def as_module(name: str) -> list[str]:
    """The beginning of a command that runs a module of this clone; needs `environment()`.

    -P keeps the current folder out of the search: it may hold another `bench`.
    """
    return [sys.executable, "-P", "-m", name]


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of such a process: those `given`, else this process's, with the clone found first.

    The current folder stays the user's, and so do relative paths among the options.
    """
    found = dict(os.environ if given is None else given)
    path = [str(REPOSITORY), *filter(None, [found.get("PYTHONPATH")])]
    return found | {"PYTHONPATH": os.pathsep.join(path)}
