"""One training loop for every stage: what has gradients learns, the rest stays frozen.

Everything random in step i follows from (seed, i) alone, so a run that was killed and resumed ends
with the same weights as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_swa_multi_avg_fn

from saml_kernels.backends.cpu.backend import keep_dense
from saml_kernels.errors import SAMLError
from saml_models.models.interface import SpeechModel
from saml_models.runtime.allocator import keep_freed_memory, return_freed_memory
from saml_models.runtime.devices import mixed_precision
from saml_models.runtime.prefetch import ahead
from saml_models.training.attention import attention_as_products
from saml_models.training.batches import Batch, BatchMaker, Sample, Shapes, plan_batches
from saml_models.training.checkpoint import Checkpoint, fingerprint
from saml_models.training.graphs import CudaCapture, GraphedPass, why_not_graphed
from saml_models.training.objective import Objective, router_offsets
from saml_models.training.options import TrainingOptions, TrainingReport

__all__ = ["fit"]

DENSE = 256 << 20  # bytes of dequantised weights that a CPU keeps from pass to pass

FEW_SHAPES = Shapes(frames=100, tokens=16, dense=True)  # one second; divides Whisper's positions


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}


def _training_mode(model: nn.Module) -> dict[str, Tensor]:
    """Dropout on; batch statistics move only where their layer is trained: those, by name."""
    model.train()
    moving: dict[str, Tensor] = {}
    for name, norm in _batch_norms(model).items():
        if norm.weight is None or not norm.weight.requires_grad:
            norm.eval()
            continue
        moving |= {f"{name}.{key}": value for key, value in norm.named_buffers()}
    return moving


def fit(
    speech: SpeechModel,
    samples: Sequence[Sample],
    options: TrainingOptions,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[], None] | None = None,
    *,
    origin: str = "",
) -> TrainingReport:
    """Train in place what has gradients: after `apply_saml`, the experts and routers.

    Experts and routers are rounded to their stored form in the end.

    Args:
        speech: plain or with SAML layers.
        samples: at least one.
        options: see `TrainingOptions`.
        checkpoint: a file to save progress to and resume from. It stays when training ends, so
            that nothing is lost before the result is saved: then `forget(checkpoint)`.
        on_step: called with (steps done, steps in all, loss) after each; on a GPU losses are read
            several at a time, and the loss is the last that was.
        on_epoch: called after each pass over the samples that ends in this process; may run the
            model, whose mode comes back.
        origin: what else must be the same for a checkpoint to be resumed, such as the hash of the
            experts that are there at the beginning.

    Raises:
        SAMLError: nothing to train on, a checkpoint of another run, or a loss that is not finite:
            that step and those after it change no weight.
    """
    if not samples:
        raise SAMLError("training: no clips; give at least one utterance with its text")
    model, device = speech.network, speech.device
    if device.type == "cpu":
        keep_freed_memory()
    accelerator, precision = _accelerator(device)
    if accelerator.num_processes > 1:
        device = accelerator.device  # each has its own
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    objective = Objective(speech, options)
    parameters, offsets = objective.parameters_trained, router_offsets(model)
    if offsets and accelerator.num_processes > 1:
        raise SAMLError("training: offsets of gates are learnt in one process; start one")
    optimiser = torch.optim.AdamW(
        _groups(parameters, offsets, options),
        betas=(0.9, 0.98),
        weight_decay=options.weight_decay,
        fused=True,
    )
    moving = _training_mode(model)
    wrapped, prepared = accelerator.prepare(objective, optimiser)

    def learn(batch: Batch) -> Tensor:
        """Gradients of a batch, and its loss."""
        prepared.zero_grad(set_to_none=False)  # a captured pass finds them where they were
        with accelerator.autocast(), half:
            loss = wrapped(batch)
        accelerator.backward(loss)
        return loss.detach()

    graphed = _graphed(learn, model, device, options, accelerator)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    batches = plan_batches([s.seconds for s in samples], options)
    steps = math.ceil(len(batches) / ranks)
    average: dict[str, Tensor] = {}
    run = fingerprint(model, samples, options, origin)
    changing = {**parameters, **moving}
    state = Checkpoint(checkpoint, changing, list(parameters), optimiser, average, run)
    done = state.resume()
    make = BatchMaker(speech, samples, options, FEW_SHAPES if graphed else None)
    losses, stopped = _Losses(done, device), torch.zeros((), device=device)
    ends = _epoch_ends(batches, len(samples), ranks)
    started = time.monotonic()
    todo = [(i, batches[(i * ranks + rank) % len(batches)]) for i in range(done, steps)]

    def prepare(job: tuple[int, list[int]]) -> Batch:
        return make(*job).pinned() if device.type == "cuda" else make(*job)

    accelerators = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(accelerators),  # each step seeds; the caller's state comes back
            attention_as_products(model, precision),
            keep_dense(DENSE),
        ):
            made = ahead(prepare, todo)
            for (i, _), batch in zip(todo, made, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = _learning_rate(i, steps, options, group["peak"])
                torch.manual_seed(options.seed * 1_000_003 + i * ranks + rank)
                loss = learn(batch.to(device)) if graphed is None else graphed(batch)
                norm = accelerator.clip_grad_norm_(parameters.values(), options.clip_norm)
                if accelerator.scaler is None:  # float16's has a way of its own
                    loss = torch.where(norm.isfinite(), loss, norm)
                    stopped = torch.maximum(stopped, 1 - loss.isfinite().float())
                    optimiser.found_inf = stopped  # type: ignore[attr-defined]
                prepared.step()
                losses.add(loss)
                _update_average(average, changing, i, steps, options)
                saving = (i + 1) % options.checkpoint_every == 0 and accelerator.is_main_process
                if saving or losses.due or i + 1 == steps:
                    losses.read()
                if saving:
                    state.save(i + 1, losses.known[-1])
                    return_freed_memory()  # gaps that batches of many lengths have left
                if on_step:
                    on_step(i + 1, steps, losses.known[-1])
                if on_epoch and i + 1 in ends:
                    on_epoch()
                    _training_mode(model)
    finally:
        model.eval()
    with torch.no_grad():
        for name, value in average.items():
            changing[name].copy_(value)
    saml: Any = getattr(model, "saml", None)
    if saml is not None:
        saml.round_experts()
    known = losses.known
    tenth = max(1, len(known) // 10)
    return TrainingReport(
        steps,
        time.monotonic() - started,
        float(np.mean(known[:tenth])) if known else state.loss,
        float(np.mean(known[-tenth:])) if known else state.loss,
    )


def _epoch_ends(batches: Sequence[Sequence[int]], clips: int, ranks: int) -> set[int]:
    """Steps after which every clip was learnt from once more."""
    heard = np.cumsum([len(batch) for batch in batches])
    return {math.ceil((i + 1) / ranks) for i in np.flatnonzero(heard % clips == 0)}


def _read_every(device: torch.device) -> int:
    """Steps whose losses are read together: several where reading waits for the device."""
    return 1 if device.type == "cpu" else 10


class _Losses:
    """Losses of steps, left where they were made and read several at a time."""

    def __init__(self, done: int, device: torch.device) -> None:
        self.done, self.known = done, list[float]()
        self.unread, self.count = torch.zeros(_read_every(device), device=device), 0

    def add(self, loss: Tensor) -> None:
        self.unread[self.count].copy_(loss)
        self.count += 1

    @property
    def due(self) -> bool:
        """Whether it is time to read: the first at once, so that there is one to show."""
        return self.count == len(self.unread) or not self.known

    def read(self) -> None:
        """Wait for the device.

        Raises:
            SAMLError: a loss, or the length of its gradient, is not finite.
        """
        for loss in self.unread[: self.count].tolist():
            if not math.isfinite(loss):
                step = self.done + len(self.known)
                raise SAMLError(f"training: the loss is {loss} at step {step}; lower the rate")
            self.known.append(loss)
        self.count = 0


def _accelerator(device: torch.device) -> tuple[Accelerator, str]:
    """accelerate's way to the device, and the precision to compute in.

    Its state is one for the whole process: what a Trainer left, or a model elsewhere, is taken as
    it is. The device in it counts where several processes learn together; one alone learns where
    its model is.
    """
    wanted = mixed_precision(device)
    if AcceleratorState._shared_state:
        made = Accelerator()
    else:
        made = Accelerator(cpu=device.type == "cpu", mixed_precision=wanted)
    made.device_placement = made.num_processes > 1
    return made, wanted if wanted == "bf16" else made.mixed_precision


def _graphed(
    learn: Callable[[Batch], Tensor],
    model: nn.Module,
    device: torch.device,
    options: TrainingOptions,
    accelerator: Accelerator,
) -> GraphedPass | None:
    """The pass as CUDA graphs, where it is wanted and possible."""
    if options.cuda_graphs is False:
        return None
    ctc = hasattr(model, "ctc_head") or hasattr(model, "ctc")
    reason = why_not_graphed(
        model, device, ctc and options.ctc > 0, accelerator.mixed_precision,
        accelerator.num_processes,
    )  # fmt: skip
    if reason is None:
        return GraphedPass(learn, device, CudaCapture(device), options.cuda_graphs is True)
    if options.cuda_graphs:
        raise SAMLError(f"cuda_graphs: not possible here, {reason}; leave it None")
    return None


def _groups(
    parameters: dict[str, Tensor], offsets: Collection[str], options: TrainingOptions
) -> list[dict[str, Any]]:
    """Parameters by the peak of their learning rate; of the routers' offsets, those by speaker."""
    own = [p for n, p in parameters.items() if n in offsets and p.dim() == 2]
    shared = [p for n, p in parameters.items() if n not in offsets or p.dim() == 1]
    groups = ((shared, options.learning_rate), (own, options.speaker_rate))
    return [{"params": params, "lr": peak, "peak": peak} for params, peak in groups if params]


def _learning_rate(step: int, steps: int, options: TrainingOptions, peak: float) -> float:
    warm = min(1.0, (step + 1) / max(1.0, options.warmup * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * warm * (0.05 + 0.95 * cosine)


@torch.no_grad()
def _update_average(
    average: dict[str, Tensor],
    changing: dict[str, Tensor],
    step: int,
    steps: int,
    options: TrainingOptions,
) -> None:
    """Running mean of the weights over the last `options.average` of the steps."""
    if options.average <= 0 or step < steps * (1 - options.average):
        return
    first = math.ceil(steps * (1 - options.average))
    values = {n: t.detach() for n, t in changing.items() if t.is_floating_point()}  # no counters
    if step == first:
        average.update({n: torch.zeros_like(t) for n, t in values.items()})
    means = [average[n] for n in values]
    get_swa_multi_avg_fn()(means, list(values.values()), step - first)
