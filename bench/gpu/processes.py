"""Calls shared out among processes, for check.py: compiling takes long, and it is of one core."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from bench.gpu.results import lost, one_line

__all__ = ["shared_out", "workers"]

MOST = 15


def workers() -> int:
    """Processes that compile side by side."""
    return max(1, min(MOST, (os.cpu_count() or 2) - 1))


def shared_out(
    call: Callable[..., dict[str, Any]],
    tasks: Sequence[tuple[Any, ...]],
    seconds: float,
    count: int | None = None,
) -> Iterator[dict[str, Any]]:
    """What `call` gives of each task, as they are done; those not begun within `seconds` are left.

    A process that dies, or whose device is lost, spoils its own task alone: another takes its
    place. One that hangs is left to whoever ends this process and its children.

    Args:
        call: of a module; gives a dictionary, whose "failed" says what went wrong.
        tasks: its arguments, the most important first.
        seconds: from now.
        count: of processes; None is `workers()`.
    """
    deadline = time.monotonic() + seconds
    waiting: queue.SimpleQueue[tuple[int, tuple[Any, ...]]] = queue.SimpleQueue()
    for task in enumerate(tasks):
        waiting.put(task)
    found: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    running = min(count or workers(), len(tasks))
    for _ in range(running):
        given = (call, waiting, found, deadline)
        threading.Thread(target=_serve, args=given, daemon=True).start()
    while running:
        try:
            row = found.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return
        if row is None:
            running -= 1
        else:
            yield row


def _serve(
    call: Callable[..., dict[str, Any]],
    waiting: queue.SimpleQueue[tuple[int, tuple[Any, ...]]],
    found: queue.SimpleQueue[dict[str, Any] | None],
    deadline: float,
) -> None:
    """Run tasks in one process after the other; None in the end."""
    pool: ProcessPoolExecutor | None = None
    try:
        while time.monotonic() < deadline:
            try:
                index, task = waiting.get_nowait()
            except queue.Empty:
                break
            # Not by fork: CUDA, once initialised, does not survive it.
            pool = pool or ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,))
            try:
                row = pool.submit(_judged, call, task).result()
            except BrokenProcessPool:
                row = {"failed": "the process died"}
            if row.pop("lost", False) or row.get("failed") == "the process died":
                pool.shutdown(wait=False)
                pool = None
            found.put({"task": index, **row})
    finally:
        if pool is not None:
            pool.shutdown(wait=False)
        found.put(None)


def _judged(call: Callable[..., dict[str, Any]], task: tuple[Any, ...]) -> dict[str, Any]:
    try:
        row = call(*task)
    except Exception as error:  # whatever a compiler or a driver says
        row = {"failed": one_line(error)}
    return {**row, "lost": lost()} if "failed" in row else row
