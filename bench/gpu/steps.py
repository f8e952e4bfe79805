"""Steps, each a process of its own with a limit of its own, for check.py: none stops another."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.place import NOT_RUN, environment

__all__ = ["Outcome", "Step", "limit_of", "run_steps"]

MARGIN = 5.0  # seconds between what a step plans with and its end
LOG_LINES = 150  # of each step's output that the log keeps
# Nothing is fetched: without a network each question takes until it is given up.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True)
class Step:
    """What is run by itself.

    Attributes:
        name: for `--do`.
        least: seconds; with fewer it is not begun.
        most: its limit.
    """

    name: str
    least: float
    most: float


@dataclass
class Outcome:
    """How a step ended: "done", "failed", "stopped" or "not run"; and one line."""

    step: str
    ended: str
    said: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.step:8} {self.ended}, {self.seconds:.0f} s: {self.said}"


def limit_of(step: Step, later: Sequence[Step], left: float) -> float | None:
    """Seconds that a step may take of those left, None for too few.

    Of what it could do without, the later ones that fit are kept their least.
    """
    spare = left - step.least
    if spare < 0:
        return None
    for other in later:
        if other.least <= spare:
            spare -= other.least
    return min(step.most, step.least + spare)


def run_steps(
    steps: Sequence[Step],
    command: Sequence[str],
    seconds: float,
    whole: bool = False,
    log: Path | None = None,
) -> list[Outcome]:
    """Each as `command --step NAME --seconds S`, until `seconds` are over; `whole` lifts `most`.

    The end of what each printed goes to `log`.
    """
    deadline, found = time.monotonic() + seconds, []
    for i, step in enumerate(steps):
        left = deadline - time.monotonic()
        if whole:
            step = Step(step.name, step.least, seconds)
        limit = limit_of(step, steps[i + 1 :], left)
        if limit is None:
            said = f"{max(0.0, left):.0f} s are left, it needs {step.least:.0f}"
            found.append(Outcome(step.name, "not run", said))
        else:
            found.append(run_step(step, command, limit, log))
        print(found[-1], flush=True)
    return found


def run_step(step: Step, command: Sequence[str], limit: float, log: Path | None = None) -> Outcome:
    """In a process of its own; what is left of it and its children is ended."""
    started = time.monotonic()
    # The clock is the machine's: what it takes to start counts too.
    call = [*command, "--since", f"{started:.3f}", "--step", step.name]
    call += ["--seconds", f"{max(1.0, limit - MARGIN):.1f}"]
    with tempfile.TemporaryFile("w+") as out:
        # A group of its own, but no session: whoever ends this process's session ends it too.
        process = subprocess.Popen(
            call, stdout=out, stderr=subprocess.STDOUT, env=environment() | OFFLINE, process_group=0
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        lines = [line.rstrip() for line in out.read().splitlines() if line.strip()]
    seconds = time.monotonic() - started
    said = lines[-1].strip() if lines else f"exit code {code}"
    if code is None:
        said = f"not done in {limit:.0f} s; its file has what it had found"
        outcome = Outcome(step.name, "stopped", said, seconds)
    elif code == NOT_RUN:
        outcome = Outcome(step.name, "not run", said, seconds)
    else:
        outcome = Outcome(step.name, "failed" if code else "done", said, seconds)
    if log is not None:
        with suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                print(f"== {outcome}", *lines[-LOG_LINES:], sep="\n", file=file)
    return outcome
