"""Times predicted for devices that were not measured, from bytes, launches and one large product.

Nothing here was measured on the devices named. A launch of the operator takes a fixed time and
whatever its bytes or its arithmetic take, the longer of the two:

- a few tokens, `single`: one launch that reads codes, float32 scales, experts and x once;
- many, `scratch`: a launch that reads x and writes [x | H], one that reads the codes and writes
  [W | B], and one product [x | H] [W | B]^T.

What is left out: that a small grid does not fill a device, that scales are decoded, that a cache
keeps anything. So these are times to be checked against, not to be quoted.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.layers.cases import EXPERTS, RANK
from bench.layers.roofline import Roofs, linear_cost
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["BOARDS", "Board", "dense", "operator", "rows"]

LAUNCH_US = 2.0  # a small kernel within a CUDA graph
REACHED = 0.72  # of the stated rate, by a large product
HALF = 2  # bytes of an activation or an expert parameter
FEW = 32  # tokens that take one launch
SHAPES = ((512, 512), (2048, 512), (512, 2048), (1280, 5120), (5120, 1280))  # N, K
TOKENS = (1, 16, 1500)


@dataclass(frozen=True)
class Board:
    """A device by its maker's figures: GB/s of memory, dense float16 TFLOP/s.

    Thor's rate is a quarter of what is stated for FP4 without sparsity.
    """

    name: str
    bandwidth: float
    rate: float

    @property
    def roofs(self) -> Roofs:
        """As they are stated."""
        return Roofs(self.bandwidth * 1e9, self.rate * 1e12)

    def launch(self, moved: float, flop: float = 0.0) -> float:
        """Microseconds of a launch that moves so many bytes and computes so much."""
        roofs = self.roofs
        return LAUNCH_US + 1e6 * max(moved / roofs.bandwidth, flop / (REACHED * roofs.rate))


BOARDS = (
    Board("Jetson Orin Nano 8 GB", 102, 17),
    Board("Jetson AGX Orin 64 GB", 204.8, 42.5),
    Board("Jetson Thor T5000", 273, 259),
)


def dense(board: Board, m: int, n: int, k: int) -> float:
    """Microseconds of a float16 linear layer without experts."""
    return board.launch(HALF * (n * k + m * (n + k)), 2 * m * n * k)


def operator(board: Board, m: int, n: int, k: int) -> float:
    """Microseconds of the operator's forward, NF4 with double-quantised scales, gates given."""
    weight = QuantizedTensor.empty((n, k), device="meta")
    r = EXPERTS * RANK
    read = weight.codes.nbytes + 4 * weight.absmax.numel()
    experts = HALF * r * (n + k)
    flop = 2 * m * (n * k + r * (n + k))
    if m <= FEW:
        return board.launch(read + experts + HALF * m * (n + k), flop)
    wide = m * (k + r)
    return (
        board.launch(HALF * (m * k + wide + r * k), 2 * m * r * k)
        + board.launch(read + HALF * (n * k + 2 * n * r))
        + board.launch(HALF * (wide + n * (k + r) + m * n), 2 * m * n * (k + r))
    )


def rows() -> list[list[str]]:
    """A row for each board, shape and number of tokens, as the documentation shows them."""
    found = []
    for board in BOARDS:
        for n, k in SHAPES:
            cells = [board.name, f"{k} -> {n}"]
            for m in TOKENS:
                stored = QuantizedTensor.empty((n, k), device="meta").nbytes
                cost = linear_cost(
                    m, n, k, weight_bytes=stored, item_bytes=HALF, experts=EXPERTS, rank=RANK
                )
                own = operator(board, m, n, k)
                cells.append(
                    f"{own:.0f} / {board.roofs.floor(cost):.0f} ({own / dense(board, m, n, k):.2f})"
                )
            found.append(cells)
    return found
