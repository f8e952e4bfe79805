"""As many threads as there are cores that other programs leave free.

PyTorch's threads wait for each other after every operation, and they wait spinning. Where one of
them shares its core with another program, all wait for it hundreds of times in a second of speech,
each time for a turn of the scheduler's (milliseconds): two threads on two cores, one of them busy,
are many times slower than one thread. So decoding looks now and then at what others take.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Sample", "free_cores", "look", "others", "sample", "shared_cores"]

PERIOD = 0.25  # seconds between two looks, in which the kernel counts 25 ticks
SPARED = 1 / 3  # of a core: what others may take before there is one thread less
STAT = Path("/proc/stat")


class Sample(NamedTuple):
    """Counters at one moment.

    Attributes:
        at: seconds of a monotonic clock.
        busy: core-seconds that the cores we may use have worked, for anybody.
        own: core-seconds that this process has worked.
    """

    at: float
    busy: float
    own: float


def sample() -> Sample | None:
    """What the kernel has counted by now; None where it does not say (not Linux)."""
    try:
        allowed = {f"cpu{n}" for n in os.sched_getaffinity(0)}
        lines = STAT.read_text().splitlines()
        tick = os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return None
    busy = 0
    for line in lines:
        name, *counts = line.split()
        if name in allowed:
            user, nice, system, _idle, _waiting, *rest = map(int, counts[:8])
            busy += user + nice + system + sum(rest)  # of rest: interrupts, a host's other guests
    return Sample(time.monotonic(), busy / tick, time.process_time())


def others(before: Sample, after: Sample) -> float:
    """Cores' worth of time that other processes took from one sample to the next."""
    taken = after.busy - before.busy - (after.own - before.own)
    return max(0.0, taken / (after.at - before.at))


_lock = threading.Lock()
_here = threading.local()  # .most: threads that this thread's block began with
_last = sample()  # loading a model takes long enough for the first look to know something
_free = math.inf


def free_cores() -> float:
    """Cores that this process may use and others left free since the last look.

    Looks at most every `PERIOD`, and remembers in between; infinite where the kernel does not say.
    """
    global _last, _free
    if _last is None or time.monotonic() - _last.at < PERIOD:
        return _free
    with _lock:
        now = sample()
        if now is None or now.at - _last.at < PERIOD:  # another thread was here
            return _free
        _last, _free = now, len(os.sched_getaffinity(0)) - others(_last, now)
    return _free


def look() -> None:
    """Within `shared_cores`: use the cores that are free now. Elsewhere nothing."""
    most = getattr(_here, "most", None)
    if most is None:
        return
    free = free_cores() + SPARED
    threads = most if free >= most else max(1, int(free))  # it may be infinite
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


@contextmanager
def shared_cores(model: torch.nn.Module | None = None) -> Iterator[None]:
    """Within the block PyTorch uses fewer threads where other programs keep cores busy.

    Never more than before the block, and as many afterwards; of the calling thread alone.

    Args:
        model: looks again at each of its calls; None leaves that to `look`.
    """
    if getattr(_here, "most", None) is not None:
        yield
        return
    with ExitStack() as stack:
        _here.most = torch.get_num_threads()
        stack.callback(_leave)
        look()
        if model is not None:
            stack.callback(model.register_forward_pre_hook(_at_call).remove)
        yield


def _at_call(model: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    look()


def _leave() -> None:
    most, _here.most = _here.most, None
    if torch.get_num_threads() != most:
        torch.set_num_threads(most)
