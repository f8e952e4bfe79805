"""Seconds of a training step with glibc's defaults and with `keep_freed_memory`, turn about.

    python bench/training_memory.py [--rounds 3]

Each run is a process of its own: five batches of random audio through Whisper tiny.en's two passes;
the first is left out. Prints each median and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from bench.models.turns import answer, in_turn
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
    samples = [training.Sample(lambda c=c: c, 7.0, "one two three four five") for c in clips]
    options = training.TrainingOptions(epochs=1, batch_seconds=32.0, max_batch=4)
    times = [time.monotonic()]
    training.fit(bind(model, processor), samples, options, on_step=lambda *_: times.append(
        time.monotonic()
    ))  # fmt: skip
    return statistics.median(np.diff(times)[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=("keep", "default"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        answer(torch.device("cpu"), one_run(o.worker == "keep"))
        return
    (default, keep), _ = in_turn(__file__, ("default", "keep"), (), o.rounds)
    pairs = zip(keep["samples_seconds"], default["samples_seconds"], strict=True)
    ratio = statistics.median(k / d for k, d in pairs)
    print(f"glibc's defaults {default['seconds']:.2f} s a step, freed memory kept "
          f"{keep['seconds']:.2f} s: ratio {ratio:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
