"""Layers with experts beside their peers and the roofline.

The contenders of a shape run in turn (A B C A B C ...) from cold caches; results are checked
against float64. Peers that are installed take part: bitsandbytes, peft, gemlite, torchao.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench.layers.cases import WORKS, Case, cases_of
from bench.layers.harness import Setting, run_cases
from bench.named import some_of
from bench.report.figures import plot_layers
from bench.report.file import Results
from bench.report.timed import tables
from saml_kernels.backends.cpu import native
from saml_kernels.errors import SAMLError
from saml_kernels.files import check_output, is_figure, is_json
from saml_models.cli.options import Overwrite
from saml_models.cli.output import progress


def main(
    work: Annotated[str | None, typer.Option(help="P1, P2, ..., by commas; default all.")] = None,
    full: Annotated[bool, typer.Option(help="Every width and number of tokens.")] = False,
    width: Annotated[int | None, typer.Option(min=32, help="d: 384 tiny, 512 base, ...")] = None,
    tokens: Annotated[str | None, typer.Option(help="Rows, by commas.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, max=64)] = None,
    rank: Annotated[int | None, typer.Option(min=1, max=256)] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.")] = None,
    cpu_level: Annotated[
        str | None, typer.Option(help="'portable C' or AVX2, to time another CPU's code.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is.")] = None,
    json_file: Annotated[
        Path, typer.Option("--json", help="Results; a PNG is drawn beside them.")
    ] = Path("saml-bench.json"),
    minutes: Annotated[float, typer.Option(min=0.1, help="Nothing is started later.")] = 9.0,
    overwrite: Overwrite = False,
) -> None:
    rows = _numbers("--tokens", tokens)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise SAMLError(f"--device {device}: no CUDA device here")
    if threads:
        torch.set_num_threads(threads)
    if cpu_level:
        if cpu_level not in native.LEVELS:
            raise SAMLError(f"--cpu-level {cpu_level}: expected one of {', '.join(native.LEVELS)}")
        native.select(cpu_level)
    check_output(json_file, is_json("about", "works"), overwrite)
    check_output(json_file.with_suffix(".png"), is_figure, overwrite)
    names = some_of("--work", work, WORKS)
    widths = [width] if width else None
    cases = [
        case
        for name in names
        for case in cases_of(name, where.type, not full, widths, rows, experts, rank)
    ]
    _run(cases, where, rounds, not full, json_file, minutes)


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise SAMLError(f"{option} {text}: expected positive integers by commas, as in 1,16,1500")
    return found


def _run(
    cases: list[Case], device: torch.device, rounds: int, short: bool, path: Path, minutes: float
) -> None:
    with progress("layers") as show:
        show(0, len(cases), "measuring the roofs")
        setting = Setting(device, rounds, short)
        results = Results(device, setting.roofs.to_dict(), path)

        def on_case(done: int, case: Case) -> None:
            show(done, len(cases), case.label)

        complete = run_cases(cases, setting, results, minutes, on_case)
    console = Console(file=sys.stdout)
    for table in tables(results.data):
        console.print(table)
    if device.type == "cpu":
        console.print("GPU rows: not run: no CUDA device was used")
    if not complete:
        console.print(f"stopped after {minutes:g} minutes; --minutes allows more")
    typer.echo(f"written: {path}")
    figure = path.with_suffix(".png")
    try:
        if plot_layers(results.data, figure):
            typer.echo(f"figure: {figure}")
    except SAMLError as error:
        # The numbers are safe; a missing drawing library must not lose them.
        typer.echo(f"no figure: {error}")
