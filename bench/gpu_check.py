"""One call for whoever has a GPU, at most ten minutes each: checks, tuning, layers, models.

    python bench/gpu_check.py                              # checks, tunes, the layers' short run
    python bench/gpu_check.py --do tune --minutes 9        # this device's tiles, a copy to ship
    python bench/gpu_check.py --do layers --work P2 --full # one question, every shape
    python bench/gpu_check.py --do models --data LibriSpeech/train-clean-5
    python bench/gpu_check.py --do counters                # where Nsight Compute is installed

* checks (gpu_checks.py): tests/kernels compiled for this device, on all cores (outputs, gradients,
  CUDA-graph capture and replay, streams, 2^31 elements); compute-sanitizer (memcheck, racecheck) on
  a small case of every kernel, where it can run; what projecting again costs backward. Nothing is
  timed if one fails, racecheck apart.
* tune: as `saml bench --tune`, with a copy of the table among the results; again, it goes on.
* layers: P1 to P5 beside every peer that is installed (`pip install --group bench-gpu`).
* models: training_step.py, and with --data transcription.py and adaptation.py.
* counters (gpu_counters.py): how busy one layer of P1 and of P2 keeps the device's parts.

Results so far are on disk whenever it stops: <device>-<date>.json, which bench/report.py reads.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_checks import check_kernels, recomputation, sanitize, small_case
from gpu_counters import counted, counters
from rich.console import Console

from saml_kernels.triton import configs
from saml_kernels.triton.tuning import tune
from saml_models.bench.cases import WIDTHS, WORKS, cases_of
from saml_models.bench.environment import about, result_path
from saml_models.bench.harness import Results, Setting, run_cases
from saml_models.bench.report import tables
from saml_models.files import atomic_path, write_json

HERE = Path(__file__).resolve().parent
LIMIT = 590.0  # seconds that one script of `models` may take


def check(device: torch.device, results: Path, minutes: float) -> bool:
    """Write checks-<device>-<date>.json; whether nothing failed that makes timing pointless."""
    path = result_path(results, device)
    path = path.with_name(f"checks-{path.name}")
    found: dict[str, Any] = {"about": about(device), "checks": {}}
    checks: dict[str, str] = found["checks"]
    for step in (lambda: {"tests/kernels": check_kernels(minutes)}, sanitize):
        checks |= step()
        write_json(path, found)
        if checks["tests/kernels"].startswith("failed"):
            break
    else:
        found["recomputation"] = recomputation()
        write_json(path, found)
    print(*(f"{name}: {said}" for name, said in checks.items()), f"results: {path}", sep="\n")
    bad = {name for name, said in checks.items() if said.startswith("failed")}
    return bad <= {"racecheck"}  # whose alarms may be false


def tune_device(device: torch.device, results: Path, minutes: float) -> None:
    shapes = [(n, k) for d in WIDTHS for n, k in ((d, d), (4 * d, d), (d, 4 * d))]
    table, rows = tune(shapes, device=device, minutes=minutes)
    if not table.is_file():
        print("tuning table: no time for a row")
        return
    copy = results / f"{configs.device_traits(device)[0]}.json"
    with atomic_path(copy) as temporary:
        temporary.write_text(table.read_text())
    print(f"tuning table: {table}, {rows} rows; a copy to ship: {copy}")


def time_layers(
    device: torch.device, results: Path, works: list[str], full: bool, minutes: float
) -> None:
    setting = Setting(device, short=not full)
    found = Results(device, setting.roofs, result_path(results, device))
    cases = [c for w in works for c in cases_of(w, device.type, not full)]
    done = run_cases(cases, setting, found, minutes, lambda case: print(case.label, flush=True))
    for table in tables(found.data):
        Console(width=150).print(table)
    print(f"results: {found.path}" + ("" if done else f"; stopped after {minutes:g} minutes"))


def time_models(results: Path, data: Path | None) -> None:
    scripts: list[tuple[str, list[str]]] = [("training_step.py", ["--batch", "8"])]
    if data is not None:
        scripts += [(name, ["--data", str(data)]) for name in ("transcription.py", "adaptation.py")]
    for script, options in scripts:
        call = [sys.executable, str(HERE / script), *options, "--results", str(results)]
        subprocess.run(call, check=True, timeout=LIMIT)


def main(
    do: Annotated[str, typer.Option(help="checks, tune, layers, models, counters; by commas.")] = (
        "checks,tune,layers"
    ),
    work: Annotated[str, typer.Option(help="Of the layers, by commas.")] = "P2,P1,P3,P4,P5",
    full: Annotated[bool, typer.Option(help="Every width and number of tokens.")] = False,
    minutes: Annotated[float, typer.Option(help="Nothing is started later.")] = 9.0,
    data: Annotated[Path | None, typer.Option(help="Speech, for the models.")] = None,
    results: Annotated[Path, typer.Option(help="Folder.")] = HERE / "results",
) -> None:
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device; run it on a machine that has one", file=sys.stderr)
        raise typer.Exit(2)
    deadline, steps = time.monotonic() + 60 * minutes, do.split(",")
    device = torch.device("cuda", torch.cuda.current_device())

    def left() -> float:
        return max(0.0, (deadline - time.monotonic()) / 60)

    if "small-case" in steps:
        small_case()
    if "counted" in steps:
        counted(work)
    fine = check(device, results, minutes / 3) if "checks" in steps else True
    if not fine:
        steps = []  # nothing is timed that is wrong
    if "tune" in steps:
        tune_device(device, results, left() / 2 if "layers" in steps else left())
    if "layers" in steps:
        works = [w for w in work.split(",") if w in WORKS]
        time_layers(device, results, works, full, left())
    if "models" in steps:
        time_models(results, data)
    if "counters" in steps:
        path = result_path(results, device)
        path = path.with_name(f"counters-{path.name}")
        write_json(path, {"about": about(device), "counters": counters()})
        print(f"counters: {path}")
    raise typer.Exit(int(not fine))


if __name__ == "__main__":
    typer.run(main)
