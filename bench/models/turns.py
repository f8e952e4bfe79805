"""Whole models: each contender in a process of its own, in turn (A B C A B C ...).

A module here starts itself again as a worker, `python -m MODULE --worker NAME ...`; the worker
prints what `answer` makes as its last line. A process of its own gives each its own peak memory and
threads, and one that cannot run takes nobody along.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.place import as_module, environment
from bench.report.environment import result_path
from bench.report.file import Results
from bench.report.timed import tables

__all__ = ["answer", "forget_peak", "in_turn", "record", "stopwatch"]

Rows = tuple[list[dict[str, Any]], dict[str, str]]


def stopwatch(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that `run` takes, the device's queue included, and what it gives."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    found = run()
    wait()
    return time.perf_counter() - started, found


def forget_peak(device: torch.device) -> None:
    """Let `answer` count the peak from here: what building the model took is over."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def answer(device: torch.device, seconds: float, **more: Any) -> None:
    """The worker's last line: seconds, peak memory (of the GPU, else of the process), and more."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e6
    else:
        # Not ru_maxrss, which a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    print(json.dumps({"seconds": seconds, "peak_megabytes": round(peak, 1), **more}))


def in_turn(module: str, names: Sequence[str], options: Sequence[Any], rounds: int) -> Rows:
    """Run every contender of a module `rounds` times, in turn.

    Args:
        module: is started with `--worker NAME` and `options`.
        names: contenders.
        options: for every worker.
        rounds: answers of each.

    Returns:
        A row for each: median and quartiles of the seconds, the highest peak, the rest of its last
        answer; and, for those that failed, the last line of what they wrote on standard error.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    console = Console(stderr=True)
    for turn in range(rounds):
        for name in names:
            if name in skipped:
                continue
            call = [*as_module(module), "--worker", name, *map(str, options)]
            done = subprocess.run(call, capture_output=True, text=True, env=environment())
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                skipped[name] = lines[-1]
                console.print(f"{name}: not run: {lines[-1]}", highlight=False)
                continue
            found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
            seconds = found[name][-1]["seconds"]
            console.print(f"round {turn + 1} of {rounds}: {name} {seconds:.2f} s", highlight=False)
    return [_row(name, answers) for name, answers in found.items()], skipped


def _row(name: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [a["seconds"] for a in answers]
    low, _, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    return {
        **answers[-1],
        "contender": name,
        "seconds": round(statistics.median(seconds), 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "samples_seconds": [round(s, 4) for s in seconds],
        "peak_megabytes": max(a["peak_megabytes"] for a in answers),
    }


def record(
    work: str, title: str, found: Rows, folder: Path, device: torch.device, threads: int
) -> None:
    """Add rows to the device's file of the day under `work`, and print them."""
    torch.set_num_threads(threads)  # part of a CPU's name
    path = result_path(folder, device)
    results = Results(device, {}, path)
    rows, skipped = found
    results.add(work, title, rows, skipped)
    console = Console()
    for table in tables({**results.data, "works": {work: results.data["works"][work]}}):
        console.print(table)
    console.print(f"written: {path}")
