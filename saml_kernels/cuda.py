"""CUDA graphs, captured in one way, and what a graph reads kept for as long as it can be replayed.

A graph holds addresses and keeps nothing alive. What is allocated while it is captured lies in a
pool of its own; what lay there before (weights, a batch) is the caller's to keep, but for what the
kernels' own code had made earlier and shares among calls: that is given to `keep`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["capture", "current", "keep"]

T = TypeVar("T")
_capturing = threading.local()  # .kept: of the capture that this thread is in


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within the block a GPU is the current one: events, streams and captures go by that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def keep(tensor: Tensor) -> bool:
    """Let the graph that is captured now keep a tensor; False where nobody is in `capture`.

    False is no error: a capture by other means than `capture` keeps nothing, and reads what is gone
    once its owner drops it.
    """
    kept: list[Tensor] | None = getattr(_capturing, "kept", None)
    if kept is None:
        return False
    kept.append(tensor)
    return True


@dataclass(frozen=True)
class _Replay:
    """A graph, and tensors that it reads."""

    graph: torch.cuda.CUDAGraph
    kept: list[Tensor]

    def __call__(self) -> None:
        self.graph.replay()


def capture(
    run: Callable[[], T], device: torch.device, pool: Any = None
) -> tuple[T, Callable[[], None]]:
    """A function's launches as one CUDA graph; other threads may allocate meanwhile.

    Args:
        run: has run before with the same shapes, so that it neither compiles nor waits.
        device: whose graph it is, current or not.
        pool: of memory, from `torch.cuda.graph_pool_handle`; None is one of its own.

    Returns:
        What `run` gave, whose contents come with each call of the second.

    Raises:
        RuntimeError: something in it cannot be captured.
    """
    with current(device):
        before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
        kept: list[Tensor] = []
        _capturing.kept = kept
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            # Where a capture cannot be ended, torch leaves its stream current and its allocator in
            # the capture, and whoever empties the cache next fails.
            torch.cuda.set_stream(before)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(before.device_index, pool)
                torch._C._cuda_releasePool(before.device_index, pool)
            raise
        finally:
            _capturing.kept = None
    return result, _Replay(graph, kept)
