"""Forward and backward of a batch's shape as one CUDA graph, captured when the shape comes again.

Capturing registers the device's generator, and a replay reads its seed and offset anew: after
`torch.manual_seed` a replay draws the very numbers that an eager pass would.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saml_kernels.cuda import capture
from saml_kernels.errors import SAMLError, one_line
from saml_models.training.batches import Batch

__all__ = ["CudaCapture", "GraphedPass", "why_not_graphed"]

MOST = 64  # graphs of a run: each holds its launches, though all share their memory

Pass = Callable[[Batch], Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


def why_not_graphed(
    model: nn.Module, device: torch.device, ctc: bool, precision: str, processes: int
) -> str | None:
    """Why the training passes of a model cannot be captured, or None if they can.

    Args:
        model: that learns.
        device: where it is.
        ctc: whether the CTC loss is part of its objective, which reads lengths on the CPU.
        precision: accelerate's name of it; float16's gradient scaler decides on the CPU.
        processes: that train together.
    """
    if device.type != "cuda":
        return f"the model is on {device}"
    if ctc:
        return "the CTC loss waits for the device"
    if precision == "fp16":
        return "the gradient scaler of float16 waits for the device"
    if processes > 1:
        return "several processes exchange gradients"
    if any((getattr(m, "layerdrop", 0.0) or 0.0) > 0 for m in model.modules()):
        return "layers are dropped at random on the CPU"
    return None


class CudaCapture:
    """What `GraphedPass` captures with on a CUDA device; its graphs share their memory.

    They may, as they are replayed one at a time and each result is read before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """The tensor that `run` gives, once what is returned with it was called."""
        return capture(run, self.device, self.pool)


@dataclass
class _Captured:
    """A graph: the batch it reads, the loss it writes."""

    batch: Batch
    loss: Tensor
    replay: Callable[[], None]


@dataclass
class GraphedPass:
    """A training pass that is captured at the second use of a shape, and replayed from then on.

    Attributes:
        run: the pass: of a batch on the device to its loss; it leaves gradients in tensors that
            stay where they are, and reads nothing else that moves.
        device: where batches go.
        capture: runs a function under capture and gives its result and what replays it; None is
            eager always.
        required: a pass that cannot be captured is an error, not a reason to go on without.
    """

    run: Pass
    device: torch.device
    capture: Capture | None
    required: bool = False
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    captured: dict[tuple[Any, ...], _Captured] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a batch (scalar), good until the next call."""
        shape = tuple(t.shape for t in batch.tensors())
        entry = self.captured.get(shape)
        if entry is not None:
            for own, given in zip(entry.batch.tensors(), batch.tensors(), strict=True):
                own.copy_(given, non_blocking=True)
        else:
            there = batch.to(self.device)
            if self.capture and shape in self.seen and len(self.captured) < MOST:
                entry = self._captured(self.capture, there)
            if entry is None:
                self.seen.add(shape)
                return self.run(there)
            self.captured[shape] = entry
        entry.replay()
        return entry.loss

    def _captured(self, capture: Capture, batch: Batch) -> _Captured | None:
        """The graph for this batch, whose tensors it keeps."""
        try:
            loss, replay = capture(lambda: self.run(batch))
        except RuntimeError as error:
            reason = one_line(error)
            if self.required:
                raise SAMLError(
                    f"cuda_graphs: this model's pass cannot be captured ({reason}); leave it None"
                ) from error
            warnings.warn(f"training goes on without CUDA graphs: {reason}", stacklevel=2)
            self.capture = None
            return None
        return _Captured(batch, loss, replay)
