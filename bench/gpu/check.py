"""Checks and times on a GPU, in one call of five minutes.

* `saml quantize tiny.en tiny.en-saml`: beforehand, on any machine
* `python -m bench gpu --model-folder tiny.en-saml --speech LibriSpeech/train-clean-5`
* `python -m bench gpu --do P2 --full --minutes 9`: one question, every shape
* `python -m bench gpu --do tune --minutes 9`: this device's tiles, a copy to ship
* `python -m bench gpu --do sanitizers,counters,recomputation`
* `TRITON_INTERPRET=1 python -m bench gpu --device cpu --small ...`: to try it

Steps, each a process of its own with a limit of its own, in the order of their importance; none
stops another, and one that there is no time for says so:

* shapes (checks.py): the shapes of real models by every route, output and gradients against
  float64; suite: the Triton kernels' tests compiled for this device, on all cores.
* host: what a call costs before the device starts, `python -m bench host`.
* P1 to P5, P9 to P11: layers beside every peer that is installed (`pip install --group bench-gpu`).
* models (models.py): the encoder, a token, a training step; speech: 24 clips, an adaptation.

Asked for by name alone: sanitizers (compute-sanitizer on a small case of every kernel); tune, as
`saml bench --tune`; counters (counters.py), how busy a layer keeps the device's parts, where
Nsight Compute is installed; recomputation, what projecting again costs backward.

A file for each step in --results, as far as it came; the summary is printed last. layers.json, for
all layers, is what `python -m bench report` reads once it is copied to bench/results under another
name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.place import RESULTS, as_module, environment

HOST = ("bench", "host")  # a module and its options
MARGIN = 4.0  # seconds between what a step plans with and its end


@dataclass(frozen=True)
class Step:
    """What is run by itself.

    Attributes:
        name: for `--do`.
        least: seconds; with fewer it is not begun.
        most: its limit.
    """

    name: str
    least: float
    most: float


# Five minutes in all: what one leaves, the next may use.
STEPS = (
    Step("shapes", 20, 60), Step("suite", 30, 75), Step("host", 8, 20),
    Step("P2", 14, 30), Step("P1", 14, 30), Step("P4", 12, 25),
    Step("models", 25, 60), Step("speech", 25, 70),
    Step("P9", 10, 25), Step("P10", 10, 25), Step("P11", 8, 20), Step("P3", 8, 20),
    Step("P5", 8, 20),
)  # fmt: skip
BY_NAME_ALONE = (
    Step("sanitizers", 30, 330), Step("tune", 60, 580), Step("counters", 20, 260),
    Step("recomputation", 20, 120),
)  # fmt: skip
BY_DEFAULT = ",".join(step.name for step in STEPS)
ALL = {step.name: step for step in (*STEPS, *BY_NAME_ALONE)}


@dataclass
class Outcome:
    """How a step ended: "done", "failed", "stopped" or "not run"; and one line."""

    step: str
    ended: str
    said: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.step:8} {self.ended}, {self.seconds:.0f} s: {self.said}"


def limit_of(step: Step, later: Sequence[Step], left: float) -> float | None:
    """Seconds that a step may take of those left, None for too few.

    Of what it could do without, the later ones that fit are kept their least.
    """
    spare = left - step.least
    if spare < 0:
        return None
    for other in later:
        if other.least <= spare:
            spare -= other.least
    return min(step.most, step.least + spare)


def run_steps(
    steps: Sequence[Step], command: Sequence[str], seconds: float, whole: bool = False
) -> list[Outcome]:
    """Each as `command --step NAME --seconds S`, until `seconds` are over; `whole` lifts `most`."""
    deadline, found = time.monotonic() + seconds, []
    for i, step in enumerate(steps):
        left = deadline - time.monotonic()
        if whole:
            step = Step(step.name, step.least, seconds)
        limit = limit_of(step, steps[i + 1 :], left)
        if limit is None:
            said = f"{max(0.0, left):.0f} s are left, it needs {step.least:.0f}"
            found.append(Outcome(step.name, "not run", said))
        else:
            found.append(run_step(step, command, limit))
        print(found[-1], flush=True)
    return found


def run_step(step: Step, command: Sequence[str], limit: float) -> Outcome:
    """In a process of its own; what is left of it and its children is ended."""
    started = time.monotonic()
    call = [*command, "--step", step.name, "--seconds", f"{max(1.0, limit - MARGIN):.1f}"]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            call, stdout=out, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        lines = [line.strip() for line in out.read().splitlines() if line.strip()]
    seconds = time.monotonic() - started
    if code is None:
        said = f"not done in {limit:.0f} s; its file has what it had found"
        return Outcome(step.name, "stopped", said, seconds)
    if code == NOT_RUN:
        return Outcome(step.name, "not run", lines[-1], seconds)
    said = lines[-1] if lines else f"exit code {code}"
    return Outcome(step.name, "failed" if code else "done", said, seconds)


NOT_RUN = 3  # exit code of a step that cannot run here


@dataclass
class Setting:
    """What a step is told."""

    device: Any
    results: Path
    seconds: float
    small: bool
    full: bool
    model_folder: Path | None
    speech: Path | None


def perform(name: str, setting: Setting) -> tuple[int, str]:
    """One step in this process: its exit code, and one line."""
    kinds = {
        "shapes": _shapes, "host": _host, "models": _models, "speech": _models, "tune": _tune,
        **dict.fromkeys(("suite", "sanitizers", "counters", "recomputation"), _checked),
    }  # fmt: skip
    return kinds.get(name, _layers)(name, setting)


def _shapes(name: str, setting: Setting) -> tuple[int, str]:
    from bench.gpu.checks import REAL_SHAPES, Shape, check_shapes
    from bench.gpu.results import Sheet

    sheet = Sheet(setting.results / "shapes.json", setting.device)
    shapes = [Shape(17, 64, 64, 2, 16)] if setting.small else REAL_SHAPES
    said = check_shapes(
        shapes, setting.device.type, setting.seconds, lambda rows: sheet.put("shapes", rows)
    )
    sheet.put("said", said)
    return int(said.startswith("failed")), said


def _checked(name: str, setting: Setting) -> tuple[int, str]:
    """Steps that are one call."""
    from bench.gpu.checks import SUITE, check_kernels, recomputation, sanitize
    from bench.gpu.counters import counters
    from bench.gpu.results import Sheet

    only = [f"{SUITE}/test_operator.py::test_zero_rows"] if setting.small else []
    run: dict[str, Callable[[], Any]] = {
        "suite": lambda: check_kernels(setting.seconds, only), "sanitizers": sanitize,
        "counters": counters, "recomputation": recomputation,
    }  # fmt: skip
    sheet = Sheet(setting.results / f"{name}.json", setting.device)
    found = run[name]()
    sheet.put(name, found)
    if name == "suite":
        return int(found.startswith("failed")), found.partition("\n")[0]
    if name == "sanitizers":
        bad = {tool for tool, said in found.items() if said.startswith("failed")}
        told = "; ".join(f"{tool}: {said.partition(chr(10))[0]}" for tool, said in found.items())
        return int(not bad <= {"racecheck"}), told  # whose alarms may be false
    return 0, f"written: {sheet.path}"


def _host(name: str, setting: Setting) -> tuple[int, str]:
    """The benchmark's own program, which writes its file itself."""
    import json

    from bench.gpu.results import Sheet

    path = setting.results / "host.json"
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "host.json"
        done = subprocess.run(
            [*as_module(HOST[0]), *HOST[1:], "--json", str(own)], env=environment(),
            capture_output=True, text=True, timeout=setting.seconds,
        )  # fmt: skip
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            return 1, said[-1] if said else f"exit code {done.returncode}"
        Sheet(path, setting.device).put("host", json.loads(own.read_text()))
    said = done.stdout.strip().splitlines()
    return 0, said[-1] if said else f"written: {path}"


def _layers(work: str, setting: Setting) -> tuple[int, str]:
    from bench.layers.cases import cases_of
    from bench.layers.harness import Setting as Layers
    from bench.layers.harness import run_cases
    from bench.layers.registry import contenders
    from bench.report.file import Results

    device = setting.device
    sizes: dict[str, Any] = {"widths": [64], "tokens": [3]} if setting.small else {}
    cases = cases_of(work, device.type, not setting.full, **sizes)[: 1 if setting.small else None]
    if not cases:
        return NOT_RUN, f"no shapes on a {device.type} device"
    started = time.monotonic()
    registry = contenders()
    if setting.small:
        registry = {name: c for name, c in registry.items() if not c.slow_build}
    layers = Layers(device, 2 if setting.small else 5, not setting.full, registry)
    results = Results(device, layers.roofs.to_dict(), setting.results / "layers.json")
    left = (setting.seconds - (time.monotonic() - started)) / 60
    whole = run_cases(cases, layers, results, left, lambda _, case: print(case.label, flush=True))
    return 0, _ratios(results.data["works"].get(work, {"rows": []})["rows"], len(cases), whole)


def _ratios(rows: list[dict[str, Any]], cases: int, whole: bool) -> str:
    """Of a work, by mode: our time over the dense layer's and over the user's composition's."""
    from bench.report.markdown import geometric
    from bench.report.timed import BARS

    told = []
    for mode in dict.fromkeys(r["mode"] for r in rows):
        for bar, short in BARS.items():
            found = [
                r["ratios"][bar] for r in rows
                if r["mode"] == mode and r["contender"] == "saml + experts" and bar in r["ratios"]
            ]  # fmt: skip
            if found:
                told.append(f"{mode} / {short} {geometric(found):.2f}")
    done = len({(r["mode"], r["m"], r["n"], r["k"], r["experts"], r["rank"]) for r in rows})
    return f"{done} of {cases} shapes" + "; ".join(["", *told]) + ("" if whole else "; time is up")


def _models(name: str, setting: Setting) -> tuple[int, str]:
    if setting.model_folder is None:
        return NOT_RUN, "no --model-folder; `saml quantize` makes one"
    if name == "speech" and setting.speech is None:
        return NOT_RUN, "no --speech"
    from bench.gpu import models
    from bench.gpu.results import Sheet

    sizes = models.SMALL if setting.small else models.ModelSizes()
    place = models.Place(setting.model_folder, setting.device, sizes, setting.speech)
    sheet = Sheet(setting.results / f"{name}.json", setting.device)
    said = models.measure(models.PARTS[name], place, sheet, setting.seconds)
    return int("failed" in said), said


def _tune(name: str, setting: Setting) -> tuple[int, str]:
    from bench.layers.cases import WIDTHS, WORKS
    from saml_kernels.backends.triton import configs
    from saml_kernels.backends.triton.tuning import tune
    from saml_kernels.files import atomic_path

    shapes = [shape for d in WIDTHS for shape in WORKS["P1"].shapes(d)]
    table, rows = tune(shapes, device=setting.device, minutes=setting.seconds / 60)
    if not table.is_file():
        return NOT_RUN, "no time for a row"
    copy = setting.results / f"{configs.device_traits(setting.device)[0]}.json"
    with atomic_path(copy) as temporary:
        temporary.write_text(table.read_text())
    return 0, f"{table}, {rows} rows; a copy to ship: {copy}"


def main(
    do: Annotated[str, typer.Option(help="Steps, by commas.")] = BY_DEFAULT,
    minutes: Annotated[float, typer.Option(help="For all of it.")] = 4.8,
    model_folder: Annotated[Path | None, typer.Option(help="What `saml quantize` wrote.")] = None,
    speech: Annotated[Path | None, typer.Option(help="A corpus with transcripts.")] = None,
    results: Annotated[Path, typer.Option(help="Folder.")] = RESULTS / "gpu",
    full: Annotated[bool, typer.Option(help="Every width and number of tokens.")] = False,
    small: Annotated[bool, typer.Option(help="Tiny sizes, to try this program.")] = False,
    device: Annotated[str, typer.Option()] = "cuda",
    commit: Annotated[str | None, typer.Option(help="Of this copy, if it has no git.")] = None,
    step: Annotated[str | None, typer.Option(hidden=True)] = None,
    seconds: Annotated[float, typer.Option(hidden=True)] = 60.0,
) -> None:
    if commit:
        os.environ["SAML_COMMIT"] = commit
    if step is None:
        names = [name.strip() for name in do.split(",")]
        unknown = [name for name in names if name not in ALL]
        if unknown:
            print(f"--do {unknown[0]}: expected some of {', '.join(ALL)}", file=sys.stderr)
            raise typer.Exit(2)
        if not _has(device):
            print("bench gpu: no CUDA device; run it on a machine that has one", file=sys.stderr)
            raise typer.Exit(2)
        options = ["--results", str(results), "--device", device]
        options += [*["--full"] * full, *["--small"] * small]
        for option, folder in (("--model-folder", model_folder), ("--speech", speech)):
            options += [option, str(folder)] if folder else []
        command = [*as_module("bench.gpu.check"), *options]
        # One question alone may take all the time; and the limits are those of a GPU's machine.
        whole = len(names) == 1 or small
        found = run_steps([ALL[n] for n in names], command, 60 * minutes, whole)
        print("", "Summary:", *found, f"results: {results}", sep="\n")
        raise typer.Exit(int(any(outcome.ended == "failed" for outcome in found)))
    import torch

    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else (
        torch.device(device)
    )  # fmt: skip
    if step == "small-case":
        from bench.gpu.checks import small_case

        small_case()
        return
    if step.startswith("counted-"):
        from bench.gpu.counters import counted

        counted(step.removeprefix("counted-"))
        return
    setting = Setting(where, results, seconds, small, full, model_folder, speech)
    code, said = perform(step, setting)
    print(said, flush=True)
    os._exit(code)  # without waiting for what was given up


def _has(device: str) -> bool:
    import torch

    return device != "cuda" or torch.cuda.is_available()


if __name__ == "__main__":
    typer.run(main)
