"""`saml bench`: the operator's speed on this machine, and tuning for it."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

__all__ = ["add_commands"]

SLICE = 0.003  # seconds that one contender runs in one round, at least once


def add_commands(app: typer.Typer) -> None:
    """Register `bench`."""
    app.command()(bench)


def bench(
    width: Annotated[int, typer.Option(min=32, help="d: 384 tiny, 512 base, 768 small.")] = 384,
    tokens: Annotated[str, typer.Option(help="Rows, by commas.")] = "1,5,16,300,1500",
    experts: Annotated[int, typer.Option(min=0, max=64)] = 4,
    rank: Annotated[int, typer.Option(min=1, max=256)] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    tune: Annotated[bool, typer.Option(help="Measure tiles for this GPU; keep the best.")] = False,
    minutes: Annotated[float, typer.Option(min=0.1, help="For --tune.")] = 9.0,
) -> None:
    """Time one layer with experts beside the dense layer without; or tune the GPU kernels.

    The contenders of a row run in turn (A B C A B C ...), and the median over the rounds counts.
    """
    import torch

    from saml_kernels.errors import SAMLError

    try:
        rows = [int(part) for part in tokens.split(",")]
    except ValueError:
        rows = []
    if not rows or min(rows) < 1:
        raise SAMLError(f"--tokens {tokens}: expected positive integers by commas, as in 1,16,1500")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise SAMLError(f"--device {device}: no CUDA device here")
    shapes = [(width, width), (4 * width, width), (width, 4 * width)]
    if tune:
        _tune(shapes, where, minutes)
        return
    found = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("timing", total=len(shapes) * len(rows))
        for n, k in shapes:
            for m in rows:
                found.append(
                    {"m": m, "n": n, "k": k, **_row(m, n, k, experts, rank, where, rounds)}
                )
                progress.advance(task)
    _print(found, where)
    if json_file is not None:
        from saml_models.files import write_json

        about = {"device": _name(where), "torch": torch.__version__, "experts": experts}
        write_json(json_file, {"about": {**about, "rank": rank, "rounds": rounds}, "rows": found})
        typer.echo(f"written: {json_file}")


def _tune(shapes: list[tuple[int, int]], device: Any, minutes: float) -> None:
    from saml_kernels import triton
    from saml_kernels.errors import SAMLError

    reason = triton.why_unavailable()
    if reason or device.type != "cuda":
        raise SAMLError(f"bench --tune: {reason or 'it measures a GPU; pass --device cuda'}")
    from saml_kernels.triton.tuning import tune

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("tuning")

        def on_row(done: int, total: int, row: dict[str, Any]) -> None:
            what = f"{row['direction']} {row['m']} x {row['n']} x {row['k']}: {row['route']}"
            progress.update(task, completed=done, total=total, description=what)

        path, done = tune(shapes, device=device, minutes=minutes, on_row=on_row)
    typer.echo(f"written: {path} ({done} rows); every later run on this GPU uses it")


def _row(
    m: int, n: int, k: int, experts: int, rank: int, device: Any, rounds: int
) -> dict[str, Any]:
    """Microseconds of: the dense layer, the base alone, the base with experts."""
    import torch
    import torch.nn.functional as F

    from saml_kernels import quantize, saml_linear
    from saml_kernels.ops import choose_backend

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    dense, bias, x = torch.randn(n, k, **kind), torch.randn(n, **kind), torch.randn(m, k, **kind)
    weight = quantize(dense.float())
    a, b = torch.randn(experts, rank, k, **kind), torch.randn(experts, n, rank, **kind)
    gates = torch.rand(m, experts, **kind)
    contenders: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.linear(x, dense, bias),
        "base": lambda: saml_linear(x, weight, a[:0], b[:0], gates[:, :0], bias),
        "experts": lambda: saml_linear(x, weight, a, b, gates, bias),
    }
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, run in contenders.items():
                count, started = 0, time.perf_counter()
                while count == 0 or time.perf_counter() - started < SLICE:
                    run()
                    wait()
                    count += 1
                if turn:  # the first round warms up
                    times[name].append((time.perf_counter() - started) / count * 1e6)
    medians = {f"{name}_us": round(statistics.median(t), 2) for name, t in times.items()}
    return {"backend": choose_backend(x, weight), **medians}


def _print(rows: list[dict[str, Any]], device: Any) -> None:
    table = Table(title=f"NF4 with experts beside a dense layer, {_name(device)}")
    for column in (
        "rows",
        "in",
        "out",
        "backend",
        "dense us",
        "base us",
        "with experts us",
        "ratio",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        ratio = row["experts_us"] / row["dense_us"]
        cells = [row["m"], row["k"], row["n"], row["backend"]]
        times = [f"{row[f'{name}_us']:.1f}" for name in ("dense", "base", "experts")]
        table.add_row(*map(str, cells), *times, f"{ratio:.2f}")
    Console(file=sys.stdout).print(table)


def _name(device: Any) -> str:
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
