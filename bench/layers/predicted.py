"""Times predicted for devices that were not measured, by the cost model that picks routes there.

The model is `saml_kernels/backends/triton/costs.py`; here are the devices, and the tables that the
documentation shows. These are times to be checked against, not to be quoted.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.layers.roofline import Cost, Roofs, linear_cost
from saml_kernels.backends.triton import costs
from saml_kernels.backends.triton.configs import Config, predicted
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["BOARDS", "SERVERS", "SHAPES", "TOKENS", "TRAINED", "Named", "heads", "rows"]

SHAPES = ((512, 512), (2048, 512), (512, 2048), (1280, 5120), (5120, 1280))  # N, K
TOKENS = (1, 16, 128, 1500)  # forward
TRAINED = (256, 1500)  # backward


@dataclass(frozen=True)
class Named:
    """A device by its maker's figures, and the capability its kernels are built for."""

    name: str
    capability: str
    device: costs.Device

    @property
    def roofs(self) -> Roofs:
        """As they are stated."""
        return Roofs(self.device.bandwidth, self.device.rate)

    def choice(self, direction: str, m: int, n: int, k: int) -> tuple[Config, float]:
        """What the rule chooses, and its predicted microseconds."""
        processors = self.device.processors
        return predicted(direction, m, n, k, self.capability, processors, device=self.device)


BOARDS = (
    Named("Jetson Orin Nano 8 GB", "sm_87", costs.Device(8, 102e9, 17e12)),
    Named("Jetson AGX Orin 64 GB", "sm_87", costs.Device(16, 204.8e9, 42.5e12)),
    # An eighth of the rate that is stated for FP4 with sparsity.
    Named("Jetson Thor T5000", "sm_110", costs.Device(20, 273e9, 259e12)),
)
SERVERS = (
    Named("A100 80 GB", "sm_80", costs.Device(108, 2039e9, 312e12)),
    Named("H100 SXM", "sm_90", costs.Device(132, 3350e9, 989e12)),
)


def heads() -> list[str]:
    """Of the columns of `rows`."""
    plural = ["1 token" if m == 1 else f"{m} tokens" for m in TOKENS]
    return ["predicted", "layer", *plural, *(f"{m} tokens, backward" for m in TRAINED)]


def rows(devices: tuple[Named, ...]) -> list[list[str]]:
    """A row for each device and shape, as the documentation shows them."""
    found = []
    for named in devices:
        for n, k in SHAPES:
            stored = QuantizedTensor.empty((n, k), device="meta").nbytes
            cells = [named.name, f"{k} -> {n}"]
            for m in (*TOKENS, *TRAINED):
                train = len(cells) >= 2 + len(TOKENS)
                config, time = named.choice("backward" if train else "forward", m, n, k)
                floor = named.roofs.floor(_cost(m, n, k, stored, train))
                plain = costs.dense(named.device, m, n, k)
                route = "one launch" if config.route in ("single", "split") else config.route
                route = "persistent" if config.loads == "descriptors" else route
                cells.append(f"{time:.0f} / {floor:.0f} ({time / plain:.2f}), {route}")
            found.append(cells)
    return found


def _cost(m: int, n: int, k: int, stored: int, train: bool) -> Cost:
    """Of a forward, or of a backward alone."""
    forward, both = (
        linear_cost(
            m, n, k, weight_bytes=stored, item_bytes=costs.HALF,
            experts=costs.EXPERTS, rank=costs.RANK, train=and_backward,
        )
        for and_backward in (False, True)
    )  # fmt: skip
    if not train:
        return forward
    return Cost(both.bytes - forward.bytes, both.flop - forward.flop)
