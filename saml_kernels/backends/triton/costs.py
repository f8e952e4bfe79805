"""What a call should take on a device, predicted from bytes, launches and products.

The rule that picks a route where no table was measured (configs.py), and the source of the
predicted times in the documentation. Nothing here was measured on the devices named: constants are
makers' figures and assumptions about kernels, and no time it gives is one to be quoted. A launch
takes a fixed time and, the longest of the three, whatever its bytes take, its arithmetic on the
processors that it gives work, or the steps of its loops one after the other. Left out: that a cache
keeps anything, and what a clock does under load.

Times are microseconds; the calls are those of 16-bit activations, a weight of 4 bits with a float32
scale for each block of 64, and 4 experts of rank 16 with a token router.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

__all__ = ["EXPERTS", "HALF", "RANK", "Device", "backward", "dense", "device_of", "forward"]

EXPERTS, RANK = 4, 16
HALF = 2  # bytes of an activation, an expert parameter or a dequantised weight
CODED = 0.5 + 4 / 64  # bytes of a weight as it is read: its code, its part of a scale
WIDE = 4  # bytes of a partial sum

LAUNCH_US = 2.0  # a small kernel within a CUDA graph
DEPENDENT_US = 1.0  # by one that starts before the kernel that it waits for has ended
CUBLAS = 0.72  # of the stated rate, by a large product of cuBLAS
SCRATCH = 0.6  # by one of Triton's on a dequantised weight
DESCRIBED = 0.66  # by a persistent one on tensor descriptors
DECODED = 0.32  # by one that decodes the weight in its loop
DECODED_BACK = 0.2  # by one that decodes it transposed
STEP_US = 0.5  # of a loop that loads, decodes and multiplies, for each 64 of its reduction
DEEP = 2  # such steps that a tile of 128 or more has under way at once
SHARE_US = 0.5  # four partial sums added by the program that comes last
HANDOVER_US = 1.0  # until what one program has stored is seen by those that wait for it
RESIDENT = 2  # programs that a processor works on at once


class Tiles(Protocol):
    """What a time depends on of a `configs.Config`."""

    @property
    def route(self) -> str: ...
    @property
    def block_m(self) -> int: ...
    @property
    def block_o(self) -> int: ...
    @property
    def block_d(self) -> int: ...
    @property
    def split(self) -> int: ...
    @property
    def loads(self) -> str: ...
    @property
    def dependent(self) -> bool: ...


@dataclass(frozen=True)
class Device:
    """A GPU by its maker's figures.

    Attributes:
        processors: streaming multiprocessors.
        bandwidth: of memory, bytes a second.
        rate: of 16-bit products without sparsity, FLOP a second.
    """

    processors: int
    bandwidth: float
    rate: float

    def launch(
        self,
        moved: float,
        flop: float = 0.0,
        reached: float = CUBLAS,
        programs: float = math.inf,
        steps: float = 0.0,
    ) -> float:
        """One kernel that moves so many bytes and computes so much.

        `reached` is the part of the rate that it gets where all processors work; `steps` what each
        of its `programs` does one after the other, in units of `STEP_US`.
        """
        full = min(1.0, programs / self.processors)
        waves = 1
        if math.isfinite(programs):
            waves = math.ceil(programs / (RESIDENT * self.processors))
        compute = flop / (reached * self.rate * full)
        seconds = max(moved / self.bandwidth, compute)
        return LAUNCH_US + max(1e6 * seconds, waves * steps * STEP_US)

    def cublas(self, m: int, n: int, k: int, result: int = HALF) -> float:
        """A product [M, K] [K, N] by cuBLAS, both operands in 16 bits, numbers of so many bytes.

        By large tiles at the full rate, or by small ones at half of it, which share the reduction
        out: whichever is faster.
        """
        moved, flop = HALF * (m * k + n * k) + result * m * n, 2 * m * n * k
        large = math.ceil(m / 128) * math.ceil(n / 128)
        small = math.ceil(m / 64) * math.ceil(n / 64) * min(4, math.ceil(k / 512))
        return min(
            self.launch(moved, flop, CUBLAS, large), self.launch(moved, flop, CUBLAS / 2, small)
        )


# One processor of the architecture's usual part: GB/s, TFLOP/s.
_PROCESSOR = {
    "sm_80": (2039 / 108, 312 / 108),  # A100 80 GB
    "sm_86": (600 / 72, 125 / 72),  # A10
    "sm_87": (204.8 / 16, 42.5 / 16),  # Jetson AGX Orin 64 GB
    "sm_89": (1008 / 128, 165 / 128),  # RTX 4090
    "sm_90": (3350 / 132, 989 / 132),  # H100 SXM
    "sm_100": (8000 / 148, 2250 / 148),  # B200
    "sm_110": (273 / 20, 259 / 20),  # Jetson Thor T5000: an eighth of its sparse FP4 rate
    "sm_120": (1792 / 170, 209.5 / 170),  # RTX 5090
}


def device_of(capability: str, processors: int) -> Device:
    """A device of a capability ("sm_90") by the size of its usual part, scaled."""
    bandwidth, rate = _PROCESSOR.get(capability, _PROCESSOR["sm_80"])
    return Device(processors, bandwidth * processors * 1e9, rate * processors * 1e12)


def dense(device: Device, m: int, n: int, k: int) -> float:
    """A linear layer in 16 bits without experts."""
    return device.cublas(m, n, k)


def forward(device: Device, tiles: Tiles, m: int, n: int, k: int) -> float:
    """Y = X W^T + s H B^T of `m` tokens by a route and its tiles."""
    r, c = EXPERTS * RANK, EXPERTS * RANK + EXPERTS
    x, y, experts = HALF * m * k, HALF * m * n, HALF * r * (n + k)
    if tiles.route in ("single", "decode"):
        time = _one_launch(device, tiles, m, n, k, r, CODED * n * k, DECODED)
        if tiles.route == "single":
            return time
        # A second launch starts behind the first, and adds one share after the other.
        return time + (DEPENDENT_US if tiles.dependent else LAUNCH_US) + 0.75 * tiles.split
    if tiles.route == "stacked":
        # In float32, as a router's logits must be.
        wide = WIDE * m * (n + c)
        finish = device.launch(wide + y + HALF * n * r, 2 * m * n * r)
        return _fill(device, n, k, c * k) + device.cublas(m, n + c, k, WIDE) + finish
    project = device.launch(x + HALF * m * c + HALF * c * k, 2 * m * k * c)
    if tiles.route == "scratch":
        project = device.launch(2 * x + HALF * m * c + HALF * c * k, 2 * m * k * c)
        return project + _fill(device, n, k, n * r) + device.cublas(m, n, k + r)
    read, reached = CODED * n * k, DECODED
    if tiles.route == "dense":
        described = tiles.loads == "descriptors"
        project += _fill(device, n, k, n * r if described else 0)
        read, reached = HALF * n * k, DESCRIBED if described else SCRATCH
    programs, steps = _grid(tiles, m, n, k)
    moved = read + x + y + experts
    time = project + device.launch(moved, 2 * m * n * (k + r), reached, programs, steps)
    if tiles.split > 1:
        sums = WIDE * tiles.split * m * n
        time += 1e6 * sums / device.bandwidth + device.launch(sums + y)
    return time


def backward(device: Device, tiles: Tiles, m: int, n: int, k: int) -> float:
    """Every gradient of `m` tokens, P kept, by a route and its tiles."""
    r = EXPERTS * RANK
    c = r + EXPERTS
    x, dy, experts = HALF * m * k, HALF * m * n, HALF * r * (n + k)
    flop = 2 * m * r * (n + k)
    gradients = device.launch(x + dy + HALF * m * (c + 2 * r) + experts, flop)
    if tiles.route == "scratch":
        wide = HALF * m * (k + r)
        finish = device.launch(wide + HALF * m * c + WIDE * m * r + x, 2 * m * k * c)
        return _fill(device, n, k, n * r) + device.cublas(m, k + r, n) + finish + gradients
    read, reached, fill = CODED * n * k, DECODED_BACK, 0.0
    if tiles.route == "dense":
        fill = _fill(device, n, k, 0)
        read, reached = HALF * n * k, SCRATCH
    return fill + _one_launch(device, tiles, m, k, n, r, read, reached) + gradients


def _fill(device: Device, n: int, k: int, more: int) -> float:
    """The weight dequantised to scratch, with so many numbers of the experts copied to it."""
    return device.launch(CODED * n * k + HALF * (n * k + 2 * more))


def _grid(tiles: Tiles, m: int, out: int, along: int) -> tuple[int, float]:
    """Programs of a product, and the steps of each."""
    programs = math.ceil(m / tiles.block_m) * math.ceil(out / tiles.block_o) * tiles.split
    each = math.ceil(math.ceil(along / tiles.block_d) / tiles.split)
    deep = DEEP if tiles.block_d >= 128 else 1
    return programs, each * tiles.block_d / 64 / deep


def _one_launch(
    device: Device,
    tiles: Tiles,
    m: int,
    out: int,
    along: int,
    r: int,
    read: float,
    reached: float,
) -> float:
    """A product and what the experts add to it, with tickets, by `single` or `backward`."""
    programs, steps = _grid(tiles, m, out, along)
    experts = HALF * r * (out + along)
    sums = 2 * WIDE * tiles.split * m * out if tiles.split > 1 else 0
    moved = read + experts + HALF * m * (out + along) + sums
    flop = 2 * m * (out * along + r * (out + along))
    time = device.launch(moved, flop, reached, programs, steps)
    adding = SHARE_US * math.ceil(tiles.split / 4) if tiles.split > 1 else 0.0
    return time + adding + HANDOVER_US
