"""Bytes and arithmetic of a linear layer, and the time below which a device cannot run it.

The floor is max(bytes / bandwidth, FLOP / rate): everything is read and written once, nothing is
kept from the call before. Both roofs are measured on the device itself: a triad (a = b + s c) or a
copy for the bandwidth, one large product for the rate, each the best of several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from saml_kernels.timing import sample

__all__ = ["Cost", "Roofs", "linear_cost", "measure_roofs"]

BEST_OF = 9


@dataclass(frozen=True)
class Cost:
    """What one call must move and compute."""

    bytes: float
    flop: float


@dataclass(frozen=True)
class Roofs:
    """Bytes a second and floating-point operations a second."""

    bandwidth: float
    rate: float

    def floor(self, cost: Cost) -> float:
        """Microseconds below which a call of this cost cannot run."""
        return max(cost.bytes / self.bandwidth, cost.flop / self.rate) * 1e6

    def to_dict(self) -> dict[str, float]:
        """Both in 1e9 a second, for a file of results."""
        return {
            "bandwidth_gb_s": round(self.bandwidth / 1e9, 1),
            "rate_gflop_s": round(self.rate / 1e9, 1),
        }


def linear_cost(
    m: int,
    n: int,
    k: int,
    *,
    weight_bytes: float,
    item_bytes: int,
    experts: int = 0,
    rank: int = 0,
    speakers: int = 1,
    train: bool = False,
) -> Cost:
    """Y = X W^T + bias with E experts of rank r, R = E r; with `train` its backward as well.

    Forward: 2 M N K + 2 M R (N + K) operations. Backward: dX takes 2 M N K (W is frozen), and dH,
    dP A, dA and dB 4 M R (N + K).

    Args:
        m, n, k: tokens, out-features, in-features.
        weight_bytes: of W as it is stored.
        item_bytes: of one activation or expert parameter.
        experts, rank: E and r.
        speakers: sets of experts that are read.
        train: forward and backward, with the gradients of X, A, B and the gates written.
    """
    r = experts * rank
    flop = 2 * m * (n * k + r * (n + k))
    adapters = speakers * r * (n + k)
    items = m * (n + k + experts) + adapters + n
    if train:
        flop += 2 * m * n * k + 4 * m * r * (n + k)
        # dY, X and the experts are read again; dX, dA, dB and dG written.
        items += m * (n + 2 * k + 2 * experts) + 2 * adapters
    passes = 2 if train else 1
    return Cost(passes * weight_bytes + item_bytes * items, flop)


def measure_roofs(device: torch.device, dtype: torch.dtype) -> Roofs:
    """This device's bandwidth, and its rate of products in `dtype`."""
    on_gpu = device.type == "cuda"
    count = (256 if on_gpu else 32) << 20
    b, c = (torch.ones(count, device=device) for _ in range(2))
    a = torch.empty_like(b)
    size = 8192 if on_gpu else 1536
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    z = torch.empty_like(x)
    if on_gpu:
        moved = 2 * a.nbytes
        microseconds = _best(lambda: a.copy_(b), device)
    else:
        moved = 3 * a.nbytes
        microseconds = _best(lambda: torch.add(b, c, alpha=3.0, out=a), device)
    bandwidth = moved / microseconds * 1e6
    rate = 2 * size**3 / _best(lambda: torch.mm(x, y, out=z), device) * 1e6
    return Roofs(bandwidth, rate)


def _best(run: Callable[[], Any], device: torch.device) -> float:
    with torch.no_grad():
        run()
        return min(sample([run], device) for _ in range(BEST_OF))
