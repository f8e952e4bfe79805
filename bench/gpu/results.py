"""Files of results and limits of time, for check.py."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.report.environment import about
from saml_kernels.files import is_json, write_json

__all__ = ["FILE", "Sheet", "lost", "one_line", "within"]

FILE = "gpu.json"  # of all steps


class Sheet:
    """A step's part of the file of results; on disk after each `put`, whatever ends the step.

    What other steps found is kept; steps run one after the other.
    """

    def __init__(self, folder: Path, step: str, device: torch.device) -> None:
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(self.path.read_text()) if is_json()(self.path) else {}
        self.part: dict[str, Any] = {"about": about(device)}
        self.data: dict[str, Any] = {**earlier, step: self.part}
        write_json(self.path, self.data)  # a step that is ended before its first result was begun

    def put(self, name: str, found: Any) -> None:
        self.part[name] = found
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


def lost() -> bool:
    """Whether the device answers this process no more, as after a stray access of a kernel's.

    Whatever the process asks of it then fails, right or wrong.
    """
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def one_line(error: BaseException) -> str:
    """Its kind, and the first line of what it says."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
