"""What the commands share: their common options, progress on standard error, printing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

# torch and transformers are imported inside functions, so that `saml --help` answers at once.
__all__ = [
    "Device",
    "Epochs",
    "Experts",
    "Interrupted",
    "LearningRate",
    "Model",
    "Overwrite",
    "Seed",
    "checkpoint_of",
    "device_named",
    "given",
    "print_result",
    "print_rows",
    "progress",
    "resumable",
]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what the user has to know as its message."""


Model = Annotated[
    str,
    typer.Option(
        help="openai-whisper's name (tiny.en, base, ...), a Hugging Face id, or a folder in "
        "Hugging Face, CTranslate2 or `saml quantize` layout."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda if there is.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the utterances.")]
LearningRate = Annotated[float | None, typer.Option(min=1e-9, help="AdamW's peak.")]
Experts = Annotated[
    Path | None,
    typer.Option(help="Pretrained: a file, or `english` for base; default: those shipped."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of everything random.")]


def device_named(name: str | None) -> str:
    """The device asked for, else a GPU where there is one."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def checkpoint_of(out: Path) -> Path:
    """Where the training of `out` keeps its progress."""
    return out.with_name(f"{out.name}.checkpoint")


@contextmanager
def resumable(checkpoint: Path) -> Iterator[None]:
    """Ctrl-C says where the work done so far is; a block that ends well has saved its result."""
    from saml_models.training import checkpoints, forget

    try:
        yield
    except KeyboardInterrupt:
        left = checkpoints(checkpoint)
        if not left:
            raise
        raise Interrupted(
            f"interrupted; {left[-1]} holds the progress: run the same command to go on"
        ) from None
    forget(checkpoint)


def given(epochs: int | None, learning_rate: float | None, seed: int | None) -> dict[str, Any]:
    """What was asked for, as fields of `TrainingOptions`."""
    options = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed}
    return {key: value for key, value in options.items() if value is not None}


@contextmanager
def progress(label: str) -> Iterator[Callable[..., None]]:
    """A bar on standard error, where that is a terminal: yields show(done, total, note)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=None, note="")

        def show(done: float, total: float, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield show


def print_result(network: Any, profile: Any, out: Path) -> None:
    """What was trained, and where it is."""
    from saml_models.surgery import expert_parameters

    learnt = profile.tensors if profile.kind == "gates" else expert_parameters(network)
    trainable = sum(p.numel() for p in learnt.values())
    typer.echo(f"trainable parameters: {trainable:,}; the base is frozen")
    typer.echo(f"written: {out} ({out.stat().st_size:,} bytes, hash {profile.hash[:16]})")


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
