"""The command `saml bench`: tuning for this GPU; in a clone also the door to its benchmark."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated, Any

import typer

from saml_models.cli.output import progress

__all__ = ["DOOR", "bench"]

TUNED_WIDTH = 384
ROOT = Path(__file__).resolve().parents[2]
PROJECT = "saml-kernels"
# How `bench` is registered: what it does not know is for the benchmark's own commands.
DOOR: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


def bench(
    ctx: typer.Context,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure tiles for this GPU; keep the best.")
    ] = False,
    width: Annotated[int | None, typer.Option(min=32, help="d: 384 tiny, 512 base, ...")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Nothing is started later.")
    ] = None,
    help: Annotated[bool, typer.Option("--help", help="Show this and exit.")] = False,
) -> None:
    """Tune the kernels with --tune; without it, run the benchmark of a clone of the repository.

    In a clone `saml bench NAME ...` is `python -m bench NAME ...`; without a NAME it times layers
    beside their peers.
    """
    from saml_kernels.errors import SAMLError

    if tune and not help:
        if ctx.args:
            raise SAMLError(
                f"bench --tune: {ctx.args[0]}: expected --width, --device or --minutes alone"
            )
        d = width or TUNED_WIDTH
        _tune([(d, d), (4 * d, d), (d, 4 * d)], device, minutes)
        return
    if help and (tune or not _in_clone()):
        typer.echo(ctx.get_help())
        return
    if not _in_clone():
        raise SAMLError(
            "bench: without --tune it needs a clone of the repository, whose benchmark is not "
            "installed: clone it and run `python -m bench` there"
        )
    given = {"--width": width, "--device": device, "--minutes": minutes}
    options = [word for name, value in given.items() if value is not None
               for word in (name, str(value))]  # fmt: skip
    door: Any = _load("bench", ROOT / "bench")
    door.run(door.app, [*ctx.args, *options, *["--help"] * help], ctx)


def _in_clone() -> bool:
    """Whether these packages lie in a clone: beside `bench/` and this project's pyproject.toml."""
    project = ROOT / "pyproject.toml"
    if not project.is_file() or not (ROOT / "bench" / "__main__.py").is_file():
        return False
    try:
        return tomllib.loads(project.read_text("utf-8"))["project"]["name"] == PROJECT
    except (ValueError, KeyError, TypeError):
        return False


def _load(name: str, folder: Path) -> Any:
    """The module `app` of a package in `folder`, which no search path leads to."""
    if name not in sys.modules:
        spec = spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(package)
    return import_module(f"{name}.app")


def _tune(shapes: list[tuple[int, int]], device: str | None, minutes: float | None) -> None:
    import torch

    from saml_kernels.backends.triton import backend as triton
    from saml_kernels.errors import SAMLError

    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SAMLError(f"--device {device}: no such device; pass cuda or cuda:1") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise SAMLError(f"--device {device}: no CUDA device here")
    reason = triton.why_unavailable()
    if reason or where.type != "cuda":
        raise SAMLError(f"bench --tune: {reason or 'it measures a GPU; pass --device cuda'}")
    from saml_kernels.backends.triton.tuning import MINUTES, tune

    gains: list[float] = []
    with progress("tuning") as show:

        def on_row(done: int, total: int, row: dict[str, Any]) -> None:
            if row["before_microseconds"] is not None:
                gains.append(row["before_microseconds"] / row["microseconds"])
            show(
                done, total, f"{row['direction']} {row['m']} x {row['n']} x {row['k']}: "
                f"{row['route']}",
            )  # fmt: skip

        path, done = tune(shapes, device=where, minutes=minutes or MINUTES, on_row=on_row)
    typer.echo(f"written: {path} ({done} rows); every later run on this GPU uses it")
    if gains:
        typer.echo(f"gained: {geometric_mean(gains):.2f}x in the mean, {max(gains):.2f}x at most")
