"""Checks of what was timed: results on new input, and memory at its peak."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["peak_memory", "poisoned_error", "poisoned_errors"]


def poisoned_errors(
    run: Callable[[], Sequence[Tensor]],
    renew: Callable[[], None],
    truth: Callable[[], Sequence[Tensor]],
) -> list[float]:
    """How far each result of `run` is off on new input, the earlier ones filled with NaN.

    A kernel that leaves part of its result unwritten, or a result that was kept from the timed
    calls, cannot pass: the memory that the next result is likely to get holds NaN.

    Args:
        run: gives the results (output, gradients, ...).
        renew: replaces the input in place.
        truth: the same results for the input as it then is, in float64.

    Returns:
        Each result's ||found - expected|| / ||expected||; infinite where it is not finite.
    """
    old = run()
    with torch.no_grad():
        for result in old:
            result.fill_(float("nan"))
    del old
    renew()
    errors = []
    for found, expected in zip(run(), truth(), strict=True):
        norm = max(float(expected.norm()), 1e-30)
        off = float((found.detach().double() - expected).norm()) / norm
        errors.append(off if off == off else float("inf"))
    return errors


def poisoned_error(
    run: Callable[[], Sequence[Tensor]],
    renew: Callable[[], None],
    truth: Callable[[], Sequence[Tensor]],
) -> float:
    """The largest of `poisoned_errors`."""
    return max(poisoned_errors(run, renew, truth), default=0.0)


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `run` holds at its peak beyond what was allocated before it.

    On the CPU they are those of PyTorch's own allocator, as its profiler records them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to the terminal otherwise
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
