"""One call for whoever has a GPU, at most ten minutes each: checks, tuning, layers, models.

    python bench/gpu_check.py                              # checks, then the layers' short run
    python bench/gpu_check.py --do tune --minutes 9        # this device's tiles, a copy to ship
    python bench/gpu_check.py --do layers --work P2 --full # one question, every shape
    python bench/gpu_check.py --do models --data LibriSpeech/train-clean-5

* checks: tests/kernels compiled for this device, compute-sanitizer (memcheck, racecheck) on a small
  case where it is installed, CUDA-graph capture and replay. Nothing is timed if one fails.
* tune: as `saml bench --tune`, with a copy of the table among the results.
* layers: P1 to P5 beside every peer that is installed (`pip install --group bench-gpu`).
* models: training_step.py, and with --data transcription.py and adaptation.py.

Results so far are on disk whenever it stops: <device>-<date>.json, which bench/report.py reads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from saml_kernels import saml_linear, saml_linear_routed
from saml_kernels.triton import configs
from saml_kernels.triton.tuning import Problem, tune
from saml_models.bench.cases import WIDTHS, WORKS, cases_of
from saml_models.bench.environment import result_path
from saml_models.bench.harness import Results, Setting, run_cases
from saml_models.bench.report import tables

HERE = Path(__file__).resolve().parent
EXPERTS, RANK = 4, 16
LIMIT = 590.0  # seconds that one script of `models` may take


def check_correctness() -> dict[str, str]:
    """Name of each check -> "passed", or why it was not run. Stops at a failure."""
    found: dict[str, str] = {}
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"FUZZ": "60"}
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels", "tests/test_lookup.py"]
    subprocess.run(tests, check=True, env=plain, cwd=HERE.parent)
    found["tests/kernels"] = "passed"
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            found[tool] = "not run: compute-sanitizer is not installed"
            continue
        case = [sys.executable, __file__, "--do", "small-case"]
        subprocess.run([sanitizer, "--tool", tool, "--error-exitcode", "9", *case], check=True)
        found[tool] = "passed"
    check_graph()
    found["CUDA graph"] = "passed"
    return found


def small_case() -> None:
    """Every kernel once, for the sanitizers."""
    torch.manual_seed(0)
    call = Problem(40, 128, 192, experts=EXPERTS, rank=RANK, copies=1)
    router = torch.randn(EXPERTS, 192, device="cuda", dtype=torch.float16, requires_grad=True)
    for route in configs.ROUTES:
        call.forward(route)
        call.backward(route)
    rest = (call.weights[0], call.a, call.b, router)
    saml_linear_routed(call.x, *rest, backend="triton").sum().backward()
    torch.cuda.synchronize()


def check_graph() -> None:
    """Captured and replayed on new input, the operator gives what it gives eagerly."""
    call = Problem(5, 512, 512, experts=EXPERTS, rank=RANK, copies=1)
    arguments = (call.weights[0], call.a, call.b, call.gates, call.bias, 1.0, "triton")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # compiles outside the capture
            saml_linear(call.x, *arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = saml_linear(call.x, *arguments)
        call.x.copy_(torch.randn_like(call.x))
        graph.replay()
        torch.testing.assert_close(y, saml_linear(call.x, *arguments), rtol=0, atol=0)


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
    do: Annotated[str, typer.Option(help="checks, tune, layers, models; by commas.")] = (
        "checks,layers"
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
    if "small-case" in steps:
        small_case()
    if "checks" in steps:
        print(check_correctness())
    if "tune" in steps:
        shapes = [(n, k) for d in WIDTHS for n, k in ((d, d), (4 * d, d), (d, 4 * d))]
        table, rows = tune(shapes, minutes=(deadline - time.monotonic()) / 60)
        copy = results / f"{configs.device_traits(torch.device('cuda', 0))[0]}.json"
        copy.write_text(table.read_text())
        print(f"tuning table: {table}, {rows} rows; a copy to ship: {copy}")
    if "layers" in steps:
        works = [w for w in work.split(",") if w in WORKS]
        time_layers(torch.device("cuda"), results, works, full, (deadline - time.monotonic()) / 60)
    if "models" in steps:
        time_models(results, data)


if __name__ == "__main__":
    typer.run(main)
