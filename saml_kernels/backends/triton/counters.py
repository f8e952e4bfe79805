"""Counters that kernels find at zero and leave at zero, never shared by calls that may overlap.

Calls of one stream come one after the other and share theirs. A captured call may be replayed on
any stream and at any time, so it owns its counters for as long as its graph lives: they are cut
from a block that was zeroed outside of any capture, and that the graph keeps (`cuda.keep`). Where
none is left (a block is made by the next call that is not captured), or a graph keeps nothing, the
capture itself zeroes new ones, which costs a node of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from saml_kernels.cuda import keep

__all__ = ["Counters", "counters"]

ROOM = 4096  # counters of a stream, at least
BLOCK = 1 << 18  # for captured calls; a call takes a few dozen to a few thousand
STEP = 64  # slots start at multiples of this


class Counters:
    """Those of one device."""

    def __init__(
        self,
        device: torch.device,
        stream_of: Callable[[int], int] | None,
        capturing: Callable[[], bool] | None,
    ) -> None:
        """`stream_of` names a device's current stream, `capturing` says whether it is captured.

        None, and there is one stream and no capture.
        """
        self.device, self.index = device, device.index or 0
        self.stream_of, self.capturing = stream_of, capturing
        self.streams: dict[int, Tensor] = {}
        self.block: Tensor | None = None  # what captured calls have not taken yet
        self.low = True  # less than half of it

    def take(self, count: int) -> Tensor:
        """At least `count` int32 zeros for a call that is launched now."""
        stream = 0
        if self.capturing is not None and self.stream_of is not None:
            if self.capturing():
                return self._captured(count)
            stream = self.stream_of(self.index)
            if self.low:
                self._refill()
        kept = self.streams.get(stream)
        if kept is None or kept.numel() < count:
            kept = self.streams[stream] = self._zeros(max(ROOM, count))
        return kept

    def _refill(self) -> None:
        self.block, self.low = self._zeros(BLOCK), False
        if self.device.type == "cuda":  # a graph may be replayed on another stream
            torch.cuda.current_stream(self.device).synchronize()

    def _captured(self, count: int) -> Tensor:
        left = self.block
        if left is None or left.numel() < count:
            self.low = True
            return self._zeros(count)
        if not keep(left):
            return self._zeros(count)
        taken = -(-count // STEP) * STEP
        self.block = left[taken:]
        self.low = self.block.numel() < BLOCK // 2
        return left[:count]

    def _zeros(self, count: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros(count, dtype=torch.int32, device=self.device)


@cache
def counters(device: torch.device) -> Counters:
    """The counters of a device."""
    if device.type != "cuda":
        return Counters(device, None, None)
    current, capturing = torch._C._cuda_getCurrentRawStream, torch._C._cuda_isCurrentStreamCapturing
    return Counters(device, current, capturing)
