"""Checks and times on a GPU, in one call of some minutes.

* `python -m bench gpu --results OUT --commit abc`: a copy of the repository is all that it needs
* `python -m bench gpu --model-folder tiny.en-saml --speech LibriSpeech/train-clean-5`: with speech
* `python -m bench gpu --do P2 --full --minutes 9`: one question, every shape
* `python -m bench gpu --do tune --minutes 9`: this device's tiles, a copy to ship
* `python -m bench gpu --do sanitizers,counters,recomputation`
* `TRITON_INTERPRET=1 python -m bench gpu --device cpu --small ...`: to try it

Steps, each a process of its own with a limit of its own, in the order of their importance; none
stops another, and one that there is no time for says so:

* shapes (checks.py): the shapes of real models by every route, output and gradients against
  float64. properties (property_runs.py): graphs, autocast, profiles, rounding, torch.compile.
  suite: the Triton kernels' tests compiled for this device, on all cores.
* compile (ahead.py): what the steps after it need, on all cores.
* layers: P1 to P5, P9 to P11 beside every peer that is installed (`pip install --group bench-gpu`).
* models (models.py): the encoder, a token, a training step; speech: 24 clips, an adaptation.
* host: what a call costs before the device starts, `python -m bench host`.
* compiled: one layer beside what torch.compile makes of the equation, which compiles for long.
* tune: as `saml bench --tune`, for as long as is left.

Asked for by name alone: P1 and so on, one of the questions of layers; sanitizers
(compute-sanitizer on a small case of every kernel); counters (counters.py), how busy a layer keeps
the device's parts, where Nsight Compute is installed; recomputation, what projecting again costs
backward.

--results gets few files, each as far as it came: gpu.json (all steps), layers.json and
compiled.json, a table of tiles, and log.txt, the last that each step printed; the summary is
printed last. layers.json, for all layers, is what `python -m bench report` reads once it is copied
to bench/results under another name.

What reads speech needs soundfile, soxr, platformdirs, and jiwer for error rates. `speech` is not
run without them, nor are decoding and one property.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated, Any

import typer

from bench.gpu.steps import Step, run_steps
from bench.place import NOT_RUN, RESULTS, as_module, environment

HOST = ("bench", "host")  # a module and its options
LAST_ROW = 25.0  # seconds that tuning one more shape may take
LOG = "log.txt"
# What one leaves, the next may use; the first begins with a device that nobody has woken.
STEPS = (
    Step("shapes", 25, 70), Step("properties", 30, 75), Step("suite", 30, 90),
    Step("compile", 15, 45),
    Step("layers", 70, 190), Step("models", 25, 60), Step("speech", 25, 80),
    Step("host", 8, 30), Step("compiled", 20, 60), Step("tune", 40, 580),
)  # fmt: skip
# Questions about layers, and which part of their time each is worth.
WORKS = {"P2": 30, "P1": 30, "P4": 25, "P9": 25, "P10": 25, "P11": 20, "P3": 20, "P5": 20}
BY_NAME_ALONE = (
    *(Step(work, 15, 60) for work in WORKS),
    Step("sanitizers", 30, 330), Step("counters", 20, 260), Step("recomputation", 20, 120),
)  # fmt: skip
BY_DEFAULT = ",".join(step.name for step in STEPS)
ALL = {step.name: step for step in (*STEPS, *BY_NAME_ALONE)}


@dataclass
class Setting:
    """What a step is told.

    Attributes:
        until: when it should have ended, by `time.monotonic`.
        after: of layers, the work that took the device along: those after it remain.
    """

    device: Any
    results: Path
    until: float
    small: bool
    full: bool
    model_folder: Path | None
    speech: Path | None
    after: str | None = None

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """That are left."""
        return max(0.0, self.until - time.monotonic())


def perform(name: str, setting: Setting) -> tuple[int, str]:
    """One step in this process: its exit code, and one line."""
    kinds = {
        "shapes": _shapes, "properties": _properties, "host": _host, "compile": _compile,
        "models": _models, "speech": _models, "compiled": _compiled, "tune": _tune,
        **dict.fromkeys(("suite", "sanitizers", "counters", "recomputation"), _checked),
    }  # fmt: skip
    return kinds.get(name, _layers)(name, setting)


def _shapes(name: str, setting: Setting) -> tuple[int, str]:
    from bench.gpu.checks import REAL_SHAPES, Shape, check_shapes
    from bench.gpu.results import Sheet

    sheet = Sheet(setting.results, name, setting.device)
    shapes = [Shape(17, 64, 64, 2, 16)] if setting.small else REAL_SHAPES
    said = check_shapes(
        shapes, setting.device.type, setting.seconds, lambda rows: sheet.put("shapes", rows)
    )
    sheet.put("said", said)
    return int(said.startswith("failed")), said


def _properties(name: str, setting: Setting) -> tuple[int, str]:
    from bench.gpu.property_runs import check_properties
    from bench.gpu.results import Sheet

    sheet = Sheet(setting.results, name, setting.device)
    said = check_properties(
        setting.device, setting.seconds, lambda found: sheet.put("properties", found)
    )
    sheet.put("said", said)
    return int(said.startswith("failed")), said


def _compile(name: str, setting: Setting) -> tuple[int, str]:
    from bench.gpu.ahead import compile_ahead, distinct
    from bench.gpu.results import Sheet

    sheet = Sheet(setting.results, name, setting.device)
    sizes: dict[str, Any] = {"widths": [64], "tokens": [3]} if setting.small else {}
    cases = distinct(setting.device.type, setting.full, **sizes)[: 1 if setting.small else None]
    said = compile_ahead(
        cases, str(setting.device), setting.seconds, lambda bad: sheet.put("failed", bad)
    )
    sheet.put("said", said)
    return int(said.startswith("failed")), said


def _checked(name: str, setting: Setting) -> tuple[int, str]:
    """Steps that are one call."""
    from bench.gpu.checks import SUITE, check_kernels, recomputation, sanitize
    from bench.gpu.counters import counters
    from bench.gpu.results import Sheet

    sheet = Sheet(setting.results, name, setting.device)
    if name == "suite":
        only = [f"{SUITE}/test_operator.py::test_zero_rows"] if setting.small else []
        said = check_kernels(setting.seconds, only, lambda found: sheet.put("tests", found))
        sheet.put(name, said)
        return int(said.startswith("failed")), said.partition("\n")[0]
    run: dict[str, Callable[..., Any]] = {
        "sanitizers": sanitize, "counters": lambda put: counters(), "recomputation": recomputation,
    }  # fmt: skip
    found = run[name](lambda so_far: sheet.put(name, so_far))
    sheet.put(name, found)
    if name == "sanitizers":
        bad = {tool for tool, said in found.items() if said.startswith("failed")}
        told = "; ".join(f"{tool}: {said.partition(chr(10))[0]}" for tool, said in found.items())
        return int(not bad <= {"racecheck"}), told  # whose alarms may be false
    return 0, f"written: {sheet.path}"


def _host(name: str, setting: Setting) -> tuple[int, str]:
    """The benchmark's own program, which writes its file itself."""
    from bench.gpu.results import Sheet

    sheet = Sheet(setting.results, name, setting.device)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "host.json"
        try:
            done = subprocess.run(
                [*as_module(HOST[0]), *HOST[1:], "--rounds", "5", "--json", str(own)],
                env=environment(), capture_output=True, text=True, timeout=setting.seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            printed = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            sheet.put("printed", printed.splitlines())
            return NOT_RUN, f"not done in time, {len(printed.splitlines())} lines"
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            return 1, said[-1] if said else f"exit code {done.returncode}"
        found = json.loads(own.read_text())
    sheet.put(name, found)
    # As Triton's kernels are started, a layer as models have it.
    rows = found.get("host", []) if isinstance(found, dict) else []
    layer = next((r for r in rows if r["gating"] == "layer"), None)
    if layer is None:
        return 0, done.stdout.strip().splitlines()[-1]
    return 0, (
        f"a layer {layer['forward_us']} us ({layer['forward_ratio']} of nn.Linear), with backward "
        f"{layer['both_us']} us ({layer['both_ratio']})"
    )


def _layers(name: str, setting: Setting) -> tuple[int, str]:
    """Work by work, each within its part of the time that is left."""
    from bench.layers.cases import cases_of

    kind = setting.device.type
    sizes: dict[str, Any] = {"widths": [64], "tokens": [3]} if setting.small else {}
    names = list(WORKS) if name == "layers" else [name]
    if setting.after:
        names = names[names.index(setting.after) + 1 :]
    works = {}
    for work in names:
        cases = cases_of(work, kind, not setting.full, **sizes)
        if cases:
            works[work] = cases[: 1 if setting.small else None]
    if not works:
        return NOT_RUN, f"no shapes on a {kind} device"
    # What takes longer to compile than a step has is a step of its own.
    return _run_layers(works, setting, "layers.json", lambda c: setting.full or not c.slow_build)


def _compiled(name: str, setting: Setting) -> tuple[int, str]:
    """A case of each kind beside those that compile for long."""
    from bench.layers.cases import cases_of

    kind, works = setting.device.type, ("P1", "P2", "P4")
    cases = {work: cases_of(work, kind, True)[:1] for work in works}
    if setting.small:
        cases = {"P2": cases_of("P2", kind, True, [64], [3])[:1]}
    return _run_layers(
        cases, setting, "compiled.json",
        lambda c: c.slow_build or c.name in ("dense", "saml + experts"),
    )  # fmt: skip


def _run_layers(
    works: dict[str, Any], setting: Setting, file: str, among: Callable[[Any], bool]
) -> tuple[int, str]:
    """Case by case: one that fails leaves the others, in another process if the device is lost."""
    from bench.gpu.results import lost, one_line
    from bench.layers.cases import WORKS as TITLES
    from bench.layers.harness import Setting as Layers
    from bench.layers.harness import run_cases
    from bench.layers.registry import contenders
    from bench.report.file import Results

    registry = {name: c for name, c in contenders().items() if among(c)}
    rounds = 2 if setting.small else 5
    layers = Layers(setting.device, rounds, not setting.full, registry)
    results = Results(setting.device, layers.roofs.to_dict(), setting.results / file)
    failed: list[str] = []
    done, again = 0, 0
    for i, (work, cases) in enumerate(works.items()):
        worth = [WORKS[name] for name in list(works)[i:]]
        end = setting.until - setting.seconds * (1 - worth[0] / sum(worth))
        for case in cases:
            if time.monotonic() >= end:
                results.unfinished((setting.until - setting.began) / 60)
                break
            print(case.label, flush=True)
            try:
                run_cases([case], layers, results, setting.seconds / 60)
                done += 1
            except Exception as error:  # whatever goes wrong, the next may go right
                failed.append(f"{case.label}: {one_line(error)}")
                print(failed[-1], flush=True)
                said = {case.label: f"failed: {one_line(error)}"}
                results.add(work, TITLES[work].title, [], said)
                gc.collect()
                if lost():
                    failed.append("the device was lost")
                    break
        if lost() and work != list(works)[-1] and file == "layers.json":
            # Its results follow in the file.
            call = [sys.executable, *sys.orig_argv[1:], "--after", work]
            again = subprocess.call(call, env=environment())
            break
    rows = [r for work in results.fresh for r in results.data["works"][work]["rows"]]
    total = sum(map(len, works.values()))
    told = "; ".join([f"{done} of {total} shapes", *_ratios(rows)])
    if failed or again:
        return 1, f"failed: {len(failed)}; {told}; " + "; ".join(failed[:4])
    return 0, told + ("" if done == total else "; time is up")


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    """By mode and contender: our time over others'."""
    from bench.report.markdown import geometric
    from bench.report.timed import BARS

    bars = BARS | {"torch.compile of the reference": "torch.compile"}
    told = []
    # A base beside experts is less than what the layer is for.
    ours = [r for r in rows if r["contender"].startswith("saml")
            and (r["contender"] != "saml base" or not r["experts"])]  # fmt: skip
    for mode, name in dict.fromkeys((r["mode"], r["contender"]) for r in ours):
        mine = [r for r in ours if (r["mode"], r["contender"]) == (mode, name)]
        for bar, short in bars.items():
            found = [r["ratios"][bar] for r in mine if bar in r["ratios"]]
            if found:
                who = name.removeprefix("saml").strip(" ,+")
                told.append(f"{mode} {who} / {short} {geometric(found):.2f}")
    return told


def _models(name: str, setting: Setting) -> tuple[int, str]:
    if name == "speech" and setting.model_folder is None:
        return NOT_RUN, "no --model-folder; `saml quantize` makes one"
    if name == "speech" and setting.speech is None:
        return NOT_RUN, "no --speech"
    from bench.gpu import models
    from bench.gpu.results import Sheet

    sizes = models.SMALL if setting.small else models.ModelSizes()
    place = models.Place(setting.model_folder, setting.device, sizes, setting.speech)
    sheet = Sheet(setting.results, name, setting.device)
    said = models.measure(models.PARTS[name], place, sheet, setting.seconds)
    return int("failed" in said), said


def _tune(name: str, setting: Setting) -> tuple[int, str]:
    from bench.layers.cases import WIDTHS, WORKS
    from saml_kernels.backends.triton import configs
    from saml_kernels.backends.triton.tuning import tune
    from saml_kernels.files import atomic_path

    shapes = [shape for d in WIDTHS for shape in WORKS["P1"].shapes(d)]
    capability, _, device = configs.device_traits(setting.device)
    table, copy = configs.user_table(capability, device), setting.results / f"{capability}.json"
    gains: list[float] = []

    def on_row(done: int, total: int, row: dict[str, Any]) -> None:
        """A copy after each row: the table itself lies in the cache of the machine's user."""
        if row["before_microseconds"] is not None:
            gains.append(row["before_microseconds"] / row["microseconds"])
        copy.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(copy) as temporary:
            temporary.write_text(table.read_text())

    # No row is begun after `minutes`, and the last one has to come to its end.
    minutes = max(0.0, setting.seconds - LAST_ROW) / 60
    table, rows = tune(shapes, device=setting.device, minutes=minutes, on_row=on_row)
    if not rows:
        return NOT_RUN, "no time for a row"
    gained = f", {geometric_mean(gains):.2f}x in the mean" if gains else ""
    return 0, f"{table}, {rows} rows{gained}; a copy to ship: {copy}"


def main(
    do: Annotated[str, typer.Option(help="Steps, by commas.")] = BY_DEFAULT,
    minutes: Annotated[float, typer.Option(help="For all of it.")] = 8.5,
    model_folder: Annotated[Path | None, typer.Option(help="What `saml quantize` wrote.")] = None,
    speech: Annotated[Path | None, typer.Option(help="A corpus with transcripts.")] = None,
    results: Annotated[Path, typer.Option(help="Folder.")] = RESULTS / "gpu",
    full: Annotated[bool, typer.Option(help="Every width and number of tokens.")] = False,
    small: Annotated[bool, typer.Option(help="Tiny sizes, to try this program.")] = False,
    device: Annotated[str, typer.Option()] = "cuda",
    commit: Annotated[str | None, typer.Option(help="Of this copy, if it has no git.")] = None,
    step: Annotated[str | None, typer.Option(hidden=True)] = None,
    seconds: Annotated[float, typer.Option(hidden=True)] = 60.0,
    since: Annotated[float | None, typer.Option(hidden=True)] = None,
    after: Annotated[str | None, typer.Option(hidden=True)] = None,
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
        signal.signal(signal.SIGTERM, _end)
        steps = [ALL[name] for name in names]
        found = run_steps(steps, command, 60 * minutes, whole, results / LOG)
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
    if step.startswith("property-"):
        from bench.gpu.property_runs import check_property

        code, said = check_property(step.removeprefix("property-"), where)
        print(said, flush=True)
        os._exit(code)
    until = (time.monotonic() if since is None else since) + seconds
    setting = Setting(where, results, until, small, full, model_folder, speech, after)
    code, said = perform(step, setting)
    print(said, flush=True)
    os._exit(code)  # without waiting for what was given up


def _end(*_: Any) -> None:
    """Asked to end: the step that runs is ended too."""
    raise SystemExit(143)


def _has(device: str) -> bool:
    import torch

    return device != "cuda" or torch.cuda.is_available()


if __name__ == "__main__":
    typer.run(main)
