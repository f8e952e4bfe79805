"""Seconds of a training step by what happens to freed memory.

    python -m bench training-memory

glibc's defaults and `keep_freed_memory`, in turn. Each run is a process of its own: five batches of
random audio through Whisper tiny.en's two passes; the first is left out. Prints each median and the
ratio.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Annotated

import numpy as np
import torch
import typer

from bench.models.turns import answer, in_turn
from saml_kernels.errors import SAMLError
from saml_models.models.registry import bind

STEPS = 6


def one_run(keep: bool) -> float:
    """Median seconds of a step."""
    from saml_kernels import SAMLConfig
    from saml_models.compress.apply import apply_saml
    from saml_models.compress.loading import load_model
    from saml_models.training import loop as training

    if not keep:
        training.keep_freed_memory = lambda: False
    model, processor = load_model("tiny.en")
    apply_saml(model, SAMLConfig(expert_init="lora"))
    rng = np.random.default_rng(0)
    clips = [rng.standard_normal(16000 * 7).astype(np.float32) * 0.05 for _ in range(4 * STEPS)]
    text = "one two three four five"
    samples = [training.Sample(partial(np.asarray, clip), 7.0, text) for clip in clips]
    options = training.TrainingOptions(epochs=1, batch_seconds=32.0, max_batch=4)
    times = [time.monotonic()]
    training.fit(bind(model, processor), samples, options, on_step=lambda *_: times.append(
        time.monotonic()
    ))  # fmt: skip
    return statistics.median(np.diff(times)[1:])


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if worker:
        answer(torch.device("cpu"), one_run(worker == "keep"))
        return
    rows, skipped = in_turn("bench.models.training_memory", ("default", "keep"), (), rounds)
    if skipped:
        raise SAMLError("; ".join(f"{name} did not run: {why}" for name, why in skipped.items()))
    default, keep = rows
    pairs = zip(keep["samples_seconds"], default["samples_seconds"], strict=True)
    ratio = statistics.median(k / d for k, d in pairs)
    print(f"glibc's defaults {default['seconds']:.2f} s a step, freed memory kept "
          f"{keep['seconds']:.2f} s: ratio {ratio:.2f}")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
