"""One training loop for every stage: what has gradients learns, the rest stays frozen.

Everything random in step i follows from (seed, i) alone, so a run that was killed and resumed ends
with the same weights as one that was not.
"""

from __future__ import annotations

import glob
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from saml_kernels.cpu import keep_dense
from saml_kernels.errors import SAMLError
from saml_models.attention import attention_as_products
from saml_models.batches import Batch, BatchMaker, Sample, Shapes, plan_batches
from saml_models.families import family_of
from saml_models.graphs import CudaCapture, GraphedPass, why_not_graphed
from saml_models.memory import keep_freed_memory
from saml_models.objective import Objective
from saml_models.prefetch import ahead
from saml_models.storage import read_tensors, round_experts, weight_hash, write_tensors

__all__ = [
    "Sample",
    "TrainingOptions",
    "TrainingReport",
    "checkpoints",
    "fit",
    "forget",
    "mixed_precision",
]

DENSE = 256 << 20  # bytes of dequantised weights that a CPU keeps from pass to pass
FEW_SHAPES = Shapes(frames=100, tokens=16, dense=True)  # one second; divides Whisper's positions


# Options that are gone, as runs had them: checkpoints of then are resumed.
REMOVED = {
    "anchor": 0.0, "distil": 0.0, "flat_start": 0, "smoothing": 0.0, "corrupt": 0.0,
    "keep_prepared": False,
}  # fmt: skip


@dataclass(frozen=True)
class TrainingOptions:
    """How `fit` trains.

    Attributes:
        learning_rate: AdamW's peak, reached after `warmup` of the steps, then a cosine to 5 %.
        epochs: passes over the samples.
        batch_seconds: seconds of audio in a batch, padding included.
        max_batch: clips in a batch.
        warmup: share of the steps.
        weight_decay: AdamW's.
        clip_norm: gradients are clipped to this norm.
        speeds: a clip is resampled to one of these speeds.
        margins: seconds of silence after the clip; one is drawn for each batch.
        freq_masks, freq_width: SpecAugment (arXiv 1904.08779) over mel bins.
        time_masks, time_share: SpecAugment over time, each mask at most this share of the clip.
        average: the weights are averaged over this last share of the steps.
        ctc: share of the loss that is the encoder's CTC loss (arXiv 1609.06773), where the model
            has a CTC head.
        seed: of everything random.
        checkpoint_every: steps between checkpoints, where a folder is given.
        cuda_graphs: whether forward and backward of a batch's shape are captured when it comes
            again, which rounds the batches' sizes up; None is yes on a GPU where that is possible.
    """

    learning_rate: float = 1e-3
    epochs: int = 3
    batch_seconds: float = 100.0
    max_batch: int = 16
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    margins: tuple[float, ...] = (0.5, 1.0, 2.0)
    freq_masks: int = 2
    freq_width: int = 20
    time_masks: int = 2
    time_share: float = 0.1
    average: float = 0.0
    ctc: float = 0.3
    seed: int = 0
    checkpoint_every: int = 25
    cuda_graphs: bool | None = None


@dataclass
class TrainingReport:
    """Steps done, seconds taken (of this process), loss of the first and last tenth of steps."""

    steps: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    last_loss: float = math.nan


def mixed_precision(device: torch.device) -> str:
    """The accelerate name of the fastest safe precision: "bf16", "fp16" or "no"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return "bf16"
    return "no"


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
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    options: TrainingOptions,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> TrainingReport:
    """Train in place what has gradients: after `apply_saml`, the experts and routers.

    Experts and routers are rounded to their stored form in the end.

    Args:
        model: of a known family.
        processor: of that model.
        samples: at least one.
        options: see `TrainingOptions`.
        checkpoint: a file to save progress to and resume from. It stays when training ends, so
            that nothing is lost before the result is saved: then `forget(checkpoint)`.
        on_step: called with (steps done, steps in all, loss) after each; on a GPU losses are read
            several at a time, and the loss is the last that was.

    Raises:
        SAMLError: nothing to train on, a checkpoint of another run, or a loss that is not finite:
            that step and those after it change no weight.
    """
    if not samples:
        raise SAMLError("training: no clips; give at least one utterance with its text")
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    accelerator, precision = _accelerator(device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    torch.manual_seed(options.seed)
    family = family_of(model)
    objective = Objective(model, family, options)
    parameters = objective.parameters_trained
    optimiser = torch.optim.AdamW(
        parameters.values(),
        lr=options.learning_rate,
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

    graphed = _graphed(learn, model, options, accelerator)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    batches = plan_batches([s.seconds for s in samples], options)
    steps = math.ceil(len(batches) / ranks)
    average: dict[str, Tensor] = {}
    run = _fingerprint(model, samples, options)
    changing = {**parameters, **moving}
    state = _State(checkpoint, changing, list(parameters), optimiser, average, run)
    done = state.resume()
    make = BatchMaker(family, processor, samples, options, FEW_SHAPES if graphed else None)
    losses, stopped = _Losses(done, device), torch.zeros((), device=device)
    started = time.monotonic()
    todo = [(i, batches[(i * ranks + rank) % len(batches)]) for i in range(done, steps)]

    def prepare(job: tuple[int, list[int]]) -> Batch:
        return make(*job).pinned() if accelerator.device.type == "cuda" else make(*job)

    try:
        with attention_as_products(model, precision), keep_dense(DENSE):
            made = ahead(prepare, todo)
            for (i, _), batch in zip(todo, made, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = _learning_rate(i, steps, options)
                torch.manual_seed(options.seed * 1_000_003 + i * ranks + rank)
                if graphed is not None:
                    loss = graphed(batch)
                else:
                    loss = learn(batch.to(accelerator.device))
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
                if on_step:
                    on_step(i + 1, steps, losses.known[-1])
    finally:
        model.eval()
        routing: Any = getattr(model, "saml_routing", None)
        if routing is not None:
            routing.mask = None
    with torch.no_grad():
        for name, value in average.items():
            changing[name].copy_(value)
    if routing is not None:
        round_experts(model)
    known = losses.known
    tenth = max(1, len(known) // 10)
    return TrainingReport(
        steps,
        time.monotonic() - started,
        float(np.mean(known[:tenth])) if known else state.loss,
        float(np.mean(known[-tenth:])) if known else state.loss,
    )


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

    Its state is one for the whole process: what a Trainer left is taken as it is.
    """
    wanted = mixed_precision(device)
    given = bool(AcceleratorState._shared_state)
    made = Accelerator(cpu=device.type == "cpu", mixed_precision=None if given else wanted)
    return made, wanted if wanted == "bf16" else made.mixed_precision


def _graphed(
    learn: Callable[[Batch], Tensor],
    model: nn.Module,
    options: TrainingOptions,
    accelerator: Accelerator,
) -> GraphedPass | None:
    """The pass as CUDA graphs, where it is wanted and possible."""
    if options.cuda_graphs is False:
        return None
    ctc = hasattr(model, "ctc_head") or hasattr(model, "ctc")
    device, precision = accelerator.device, accelerator.mixed_precision
    reason = why_not_graphed(
        model, device, ctc and options.ctc > 0, precision, accelerator.num_processes
    )
    if reason is None:
        return GraphedPass(learn, device, CudaCapture(), options.cuda_graphs is True)
    if options.cuda_graphs:
        raise SAMLError(f"cuda_graphs: not possible here, {reason}; leave it None")
    return None


def forget(checkpoint: Path) -> None:
    """Remove a checkpoint, and those of several rounds beside it."""
    for path in checkpoints(checkpoint):
        path.unlink(missing_ok=True)


def checkpoints(checkpoint: Path) -> list[Path]:
    """The files that training with this checkpoint has left so far."""
    return sorted(checkpoint.parent.glob(f"{glob.escape(checkpoint.name)}*"))


def _learning_rate(step: int, steps: int, options: TrainingOptions) -> float:
    warm = min(1.0, (step + 1) / max(1.0, options.warmup * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return options.learning_rate * warm * (0.05 + 0.95 * cosine)


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
    torch._foreach_lerp_(means, list(values.values()), 1 / (step - first + 1))


def _fingerprint(model: nn.Module, samples: Sequence[Sample], options: TrainingOptions) -> str:
    """What must be equal for a checkpoint to be resumed."""
    clips = [(round(s.seconds, 3), s.text, s.language) for s in samples]
    settings = REMOVED | asdict(replace(options, checkpoint_every=0))
    if settings["cuda_graphs"] is None:
        del settings["cuda_graphs"]  # as it was before there were any
    saml, config = getattr(model, "saml_config", None), getattr(model, "config", None)
    made_for = [weight_hash(model), saml.to_dict() if saml else config.to_dict()]  # type: ignore
    return json.dumps([settings, clips, made_for], sort_keys=True, default=str)


class _State:
    """What changes, AdamW's moments and the running average in one file."""

    def __init__(
        self,
        path: Path | None,
        changing: dict[str, Tensor],
        trained: list[str],
        optimiser: torch.optim.Optimizer,
        average: dict[str, Tensor],
        fingerprint: str,
    ) -> None:
        self.path, self.changing, self.trained = path, changing, trained
        self.optimiser, self.average, self.fingerprint = optimiser, average, fingerprint
        self.loss = math.nan  # of the step that was resumed at

    def save(self, step: int, loss: float) -> None:
        if self.path is None:
            return
        tensors = {f"parameter/{n}": t.detach() for n, t in self.changing.items()}
        tensors |= {f"average/{n}": t for n, t in self.average.items()}
        for name in self.trained:
            for key, value in self.optimiser.state[self.changing[name]].items():
                tensors[f"optimiser/{key}/{name}"] = value
        about = {"step": str(step), "loss": str(loss), "run": self.fingerprint}
        write_tensors(self.path, tensors, about)

    @torch.no_grad()
    def resume(self) -> int:
        """Steps already done, with everything restored; 0 where there is no checkpoint."""
        if self.path is None or not self.path.exists():
            return 0
        tensors, about = read_tensors(self.path)
        if about.get("run") != self.fingerprint:
            raise SAMLError(
                f"{self.path}: belongs to a run with other data or options; repeat those, or "
                "remove the file to start anew"
            )
        try:
            for name, value in self.changing.items():
                value.copy_(tensors[f"parameter/{name}"])
            for name in self.trained:
                parameter = self.changing[name]
                self.optimiser.state[parameter] = {
                    key: tensors[f"optimiser/{key}/{name}"].to(parameter.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
            for key, value in tensors.items():
                own = key.removeprefix("average/")
                if own != key and own in self.changing:
                    self.average[own] = value.to(self.changing[own].device, copy=True)
            self.loss = float(about["loss"])
            return int(about["step"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise SAMLError(f"{self.path}: damaged checkpoint ({error}); remove it") from error
