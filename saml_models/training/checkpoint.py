"""A training run on disk: resumed after a kill, with the same result."""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from saml_kernels.errors import SAMLError
from saml_models.compress.layers import weight_hash
from saml_models.runtime.tensors import read_tensors, write_tensors
from saml_models.training.batches import Sample
from saml_models.training.options import TrainingOptions

__all__ = ["beside", "checkpoints", "forget"]

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


def beside(checkpoint: Path | None, name: str) -> Path | None:
    """A file of the same run, which `forget` removes too; None without a checkpoint."""
    return None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.{name}")


def forget(checkpoint: Path) -> None:
    """Remove a checkpoint, and those of several rounds beside it."""
    for path in checkpoints(checkpoint):
        path.unlink(missing_ok=True)


def checkpoints(checkpoint: Path) -> list[Path]:
    """The files that training with this checkpoint has left so far."""
    return sorted(checkpoint.parent.glob(f"{glob.escape(checkpoint.name)}*"))


def fingerprint(
    model: nn.Module, samples: Sequence[Sample], options: TrainingOptions, origin: str = ""
) -> str:
    """Of what must be equal for a checkpoint to be resumed: SHA-256 (hex)."""
    clips = [(round(s.seconds, 3), s.text, s.language) for s in samples]
    settings = asdict(replace(options, checkpoint_every=0))
    saml, config = getattr(model, "saml", None), getattr(model, "config", None)
    made_for = [weight_hash(model), saml.config.to_dict() if saml else config.to_dict()]  # type: ignore
    voices = [s.speaker for s in samples] if options.speaker_rate else []
    run = json.dumps([settings, clips, voices, made_for, origin], sort_keys=True, default=str)
    return hashlib.sha256(run.encode()).hexdigest()


class Checkpoint:
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
                f"{self.path}: belongs to a run with other data, options or experts; repeat "
                "those, or remove the file to start anew"
            )
        try:
            for name, value in self.changing.items():
                value.copy_(tensors[f"parameter/{name}"])
            for name in self.trained:
                if not any(f"optimiser/{key}/{name}" in tensors for key in MOMENTS):
                    continue  # it has had no gradient yet
                parameter = self.changing[name]
                self.optimiser.state[parameter] = {
                    key: tensors[f"optimiser/{key}/{name}"].to(parameter.device, copy=True)
                    for key in MOMENTS
                }
            for key, value in tensors.items():
                own = key.removeprefix("average/")
                if own != key and own in self.changing:
                    self.average[own] = value.to(self.changing[own].device, copy=True)
            self.loss = float(about["loss"])
            return int(about["step"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise SAMLError(f"{self.path}: damaged checkpoint ({error}); remove it") from error
