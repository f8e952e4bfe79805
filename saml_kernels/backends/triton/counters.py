"""Counters that kernels find at zero and leave at zero, never shared by calls that may overlap.

Calls of one stream come one after the other and share theirs. A captured call may be replayed on
any stream and at any time, so it owns its counters for good: they are cut from a block that was
zeroed outside of any capture. Where none is left (a block is made by the next call that is not
captured), the capture itself zeroes new ones, which costs a node of the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Counters", "counters"]

ROOM = 4096  # counters of a stream, at least
BLOCK = 1 << 18  # for captured calls; a call takes a few dozen to a few thousand
STEP = 64  # slots start at multiples of this


class Counters:
    """Hands them out."""

    def __init__(
        self,
        stream_of: Callable[[torch.device], int | None],
        capturing: Callable[[torch.device], bool],
    ) -> None:
        """`stream_of` names the current stream of a device, `capturing` says if it is captured."""
        self.stream_of, self.capturing = stream_of, capturing
        self.streams: dict[tuple[torch.device, int | None], Tensor] = {}
        self.blocks: dict[torch.device, Tensor] = {}  # what captured calls have not taken yet
        self.low: set[torch.device] = set()  # those where less than half a block is left

    def __call__(self, device: torch.device, count: int) -> Tensor:
        """At least `count` int32 zeros for a call that is launched now."""
        if device.type == "meta":
            return _zeros(count, device)
        if self.capturing(device):
            return self._captured(device, count)
        key = (device, self.stream_of(device))
        kept = self.streams.get(key)
        if kept is None or kept.numel() < count:
            kept = self.streams[key] = _zeros(max(ROOM, count), device)
            if device not in self.blocks:
                self.low.add(device)
        if self.low and device in self.low:
            self._refill(device)
        return kept

    def _refill(self, device: torch.device) -> None:
        self.low.discard(device)
        self.blocks[device] = _zeros(BLOCK, device)
        if device.type == "cuda":  # a graph may be replayed on another stream
            torch.cuda.current_stream(device).synchronize()

    def _captured(self, device: torch.device, count: int) -> Tensor:
        left = self.blocks.get(device)
        if left is None or left.numel() < count:
            self.low.add(device)
            return _zeros(count, device)
        taken = -(-count // STEP) * STEP
        self.blocks[device] = left[taken:]
        if left.numel() - taken < BLOCK // 2:
            self.low.add(device)
        return left[:count]


def _zeros(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int32, device=device)


def _stream_of(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch._C._cuda_getCurrentRawStream(device.index)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch._C._cuda_isCurrentStreamCapturing()


counters = Counters(_stream_of, _capturing)
