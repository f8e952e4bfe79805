"""P4: a training step of a whole Whisper: time and memory.

    python -m bench training-step --size small --batch 1

All ways to train run in turn. The weights are random, of that Whisper's configuration: a step costs
what it costs with real ones. Windows of 30 s, 32 tokens, AdamW; float32 on a CPU, bfloat16 autocast
on a GPU. adapters.py says what each contender trains; memory is the peak over the steps, on a CPU
of the whole process.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import WhisperConfig, WhisperForConditionalGeneration

from bench.models.adapters import ADAPTERS, EXPERTS, RANK, Trainer
from bench.models.turns import answer, forget_peak, in_turn, record, stopwatch
from bench.place import RESULTS

SIZES = {"tiny": (384, 4), "base": (512, 6), "small": (768, 12), "medium": (1024, 24)}
TOKENS = 32


def network(size: str, device: torch.device) -> WhisperForConditionalGeneration:
    """A Whisper of that size with random weights."""
    width, layers = SIZES[size]
    heads, ffn = width // 64, 4 * width
    with device:
        return WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=51865, d_model=width, encoder_layers=layers, decoder_layers=layers,
                encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=ffn,
                decoder_ffn_dim=ffn,
            )
        )  # fmt: skip


def work(name: str, size: str, batch: int, steps: int, device: torch.device) -> None:
    """Build, warm up with one step, time the others."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    trainer = Trainer(ADAPTERS[name](network(size, device), dtype).train(), device)
    features = torch.randn(batch, 80, 3000, device=device)
    labels = torch.randint(0, 50000, (batch, TOKENS), device=device)
    trainer.step(features, labels)
    forget_peak(device)
    seconds = [stopwatch(lambda: trainer.step(features, labels), device)[0] for _ in range(steps)]
    trained = sum(p.numel() for p in trainer.parameters)
    answer(device, statistics.median(seconds), trained=trained)


def main(
    size: Annotated[str, typer.Option(help="tiny, base, small or medium.")] = "small",
    batch: Annotated[int, typer.Option(help="Windows of 30 s.")] = 1,
    steps: Annotated[int, typer.Option(help="Timed in each round.")] = 2,
    rounds: Annotated[int, typer.Option()] = 3,
    threads: Annotated[int, typer.Option()] = 2,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    results: Annotated[Path, typer.Option(help="Folder.")] = RESULTS,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    where = torch.device(device)
    torch.set_num_threads(threads)
    if worker:
        work(worker, size, batch, steps, where)
        return
    options = ["--size", size, "--batch", batch, "--steps", steps, "--threads", threads]
    options += ["--device", device]
    found = in_turn("bench.models.training_step", list(ADAPTERS), options, rounds)
    title = f"training step of Whisper {size}, {batch} x 30 s, {EXPERTS} experts of rank {RANK}"
    record("P4 model", title, found, results, where, threads)


if __name__ == "__main__":
    typer.run(main)
