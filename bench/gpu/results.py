"""Files of results and limits of time, for check.py."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.report.environment import about
from saml_kernels.files import write_json

__all__ = ["Sheet", "one_line", "within"]


class Sheet:
    """A file of results, on disk after each: a step that is stopped leaves what it had found."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.data: dict[str, Any] = {"about": about(device)}
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, found: Any) -> None:
        self.data[name] = found
        write_json(self.path, self.data)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError in the block where it takes longer; a call outside of Python is not disturbed.

    Not for use within itself.
    """

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: BaseException) -> str:
    """Its kind, and the first line of what it says."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
