"""What commands print: progress, results, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

__all__ = ["Interrupted", "print_result", "print_rows", "progress", "resumable"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what the user has to know as its message."""


@contextmanager
def resumable(checkpoint: Path) -> Iterator[None]:
    """Ctrl-C says where the work done so far is; a block that ends well has saved its result."""
    from saml_models.training.checkpoint import checkpoints, forget

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
    from saml_models.compress.layers import compression_of

    learnt = profile.tensors if profile.kind == "gates" else compression_of(network).experts()
    trainable = sum(p.numel() for p in learnt.values())
    typer.echo(f"trainable parameters: {trainable:,}; the base is frozen")
    typer.echo(f"written: {out} ({out.stat().st_size:,} bytes, hash {profile.hash[:16]})")


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Names and values, the values aligned, on standard output."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
