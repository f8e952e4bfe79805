"""The one place that takes times, for tuning and everything under bench/.

A *train* is a sequence of calls that do the same work on weights of their own, like the layers of a
model. One sample is: overwrite the caches, run the train once, divide by its length. So no weight
is read from a cache, whatever the size of the device's. On a GPU the train stands between two
device events: a captured graph is queued behind the sweep, and its kernels alone are seen; calls
from Python wait for the sweep first, and their launches count. Elsewhere a monotonic clock is read.
Contenders take their samples in turn (A B C A B C ...), so that a busy machine disturbs them alike,
and compare by the median of their ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saml_kernels.cuda import capture, current

__all__ = [
    "Timing", "Train", "cache_bytes", "captured", "interleaved", "overwrite_caches", "sample",
    "timed",
]  # fmt: skip

Train = Sequence[Callable[[], Any]]
Sampler = Callable[[Train, torch.device], float]
WARM_UP = 2  # runs of each train before the first sample
TRAIN_US, LONGEST = 2e3, 50  # `timed` makes trains of two milliseconds


@dataclass(frozen=True)
class Timing:
    """Microseconds a call, one sample a round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the samples are below."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the samples is below the first, a quarter above the second."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def ratio(self, bar: Timing) -> float:
        """Median over the rounds of this one's time over `bar`'s in the same round."""
        pairs = zip(self.samples, bar.samples, strict=True)
        return statistics.median(own / other for own, other in pairs)

    def to_dict(self) -> dict[str, float]:
        """Median and quartiles in microseconds."""
        low, high = self.quartiles
        values = {"median_us": self.median, "low_us": low, "high_us": high}
        return {k: round(v, 2) for k, v in values.items()}


@cache
def cache_bytes(device: torch.device) -> int:
    """Size of the device's last cache, and at least 32 MiB."""
    size = 0
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        for level in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            size = max(size, int(level.read_text().strip().removesuffix("K")) * 1024)
    return max(size, 32 << 20)


@cache
def _sweep(device: torch.device) -> tuple[Tensor, Tensor]:
    size = 2 * cache_bytes(device) // 4
    return torch.ones(size, device=device), torch.ones(size, device=device)


def overwrite_caches(device: torch.device) -> None:
    """Write twice as many bytes as the last cache holds, then read as many others.

    What was written must be written back before its place is free, which would be charged to
    whoever reads most; what was only read need not.
    """
    written, read = _sweep(device)
    written.add_(1.0)
    read.sum()


def sample(train: Train, device: torch.device, launches: bool = False) -> float:
    """Microseconds a call of one run of `train` from cold caches.

    Args:
        train: what is run.
        device: where.
        launches: on a GPU, let the clock start when the sweep is over, so that what it takes to
            launch the calls counts in full for everybody; else it may hide behind the sweep.
    """
    if device.type == "cuda":
        with current(device):
            overwrite_caches(device)
            if launches:
                torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for call in train:
                call()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) * 1e3 / len(train)
    overwrite_caches(device)
    started = time.perf_counter()
    for call in train:
        call()
    return (time.perf_counter() - started) * 1e6 / len(train)


def interleaved(
    trains: Mapping[str, Train],
    device: torch.device,
    rounds: int = 9,
    *,
    lengths: Mapping[str, int] | None = None,
    sampler: Sampler = sample,
) -> dict[str, Timing]:
    """Time contenders in turn.

    Args:
        trains: by the contender's name.
        device: where they run.
        rounds: samples of each.
        lengths: calls behind one entry of a train, where it is not one (a captured graph).
        sampler: as `sample`.

    Returns:
        By name, in the order of `trains`.
    """
    samples: dict[str, list[float]] = {name: [] for name in trains}
    for turn in range(-WARM_UP, rounds):
        for name, train in trains.items():
            taken = sampler(train, device) / (lengths or {}).get(name, 1)
            if turn >= 0:
                samples[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def timed(
    run: Callable[[], Any], rounds: int = 30, device: str | torch.device = "cuda"
) -> dict[str, float]:
    """`Timing.to_dict` of one call, in trains long enough for the clock.

    On a GPU the train is replayed as a CUDA graph: to launch a small product from Python takes
    longer than the product.

    Args:
        run: the call.
        rounds: trains that are measured.
        device: where it runs.
    """
    where = torch.device(device)
    with current(where):
        run()
        once = sample([run], where)
        length = max(1, min(LONGEST, int(TRAIN_US / max(once, 1.0))))
        train: Train = [run] * length
        if where.type != "cuda":
            return interleaved({"": train}, where, rounds)[""].to_dict()
        replay = [captured(train)]
        return interleaved({"": replay}, where, rounds, lengths={"": length})[""].to_dict()


@dataclass(frozen=True)
class _Replay:
    """A captured graph, its last result, and the calls whose memory it reads."""

    replay: Callable[[], None]
    result: Any
    train: Train

    def __call__(self) -> Any:
        self.replay()
        return self.result


def captured(train: Train) -> Callable[[], Any]:
    """The whole train as one CUDA graph of the current device.

    What the calls of `train` hold (weights, inputs) is kept by what this returns; it must not be
    replaced.

    Returns:
        Replays the graph and gives the last result.

    Raises:
        RuntimeError: something in the train cannot be captured.
    """
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):  # compiles and allocates outside the capture
        for call in train:
            call()
    before.wait_stream(stream)
    results, replay = capture(lambda: [call() for call in train], before.device)
    return _Replay(replay, results[-1], tuple(train))
