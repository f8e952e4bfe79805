"""Runs cases: builds every contender's layers, times them in turn, checks what they gave."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.layers.cases import WORKS, Case
from bench.layers.checks import peak_memory
from bench.layers.contenders import Contender, Layer
from bench.layers.registry import contenders
from bench.layers.roofline import Roofs, measure_roofs
from bench.layers.stage import Stage, Step
from bench.report.file import Results
from saml_kernels.cuda import current
from saml_kernels.errors import SAMLError
from saml_kernels.timing import captured, interleaved, sample

__all__ = ["Setting", "chosen", "run_case", "run_cases", "takes_part"]

OURS = ("saml base", "saml + experts")


class Setting:
    """Where a run takes place and how long it may take.

    Args:
        device: whose kernels are timed.
        rounds: samples of each contender.
        short: one case of each work for contenders that take minutes to build.
        registry: contenders by name; None takes all.
        roofs: of the device; None measures them.
    """

    def __init__(
        self,
        device: torch.device,
        rounds: int = 9,
        short: bool = True,
        registry: dict[str, Contender] | None = None,
        roofs: Roofs | None = None,
    ) -> None:
        self.device, self.rounds, self.short = device, rounds, short
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.registry = registry or contenders()
        self.roofs = roofs or measure_roofs(device, self.dtype)
        self.built_slowly: set[tuple[str, str]] = set()


def takes_part(case: Case, contender: Contender) -> bool:
    """Whether a contender is asked to run a case: the work names it, or nobody."""
    wanted = WORKS[case.work].against if case.work in WORKS else None
    named = contender.speakers is None if wanted is None else contender.name in wanted
    fits = case.experts > 0 or contender.experts == "none"
    return named and fits and case.mode in contender.modes


def chosen(case: Case, setting: Setting) -> tuple[list[Contender], dict[str, str]]:
    """Who runs a case, and why the others of its work do not."""
    run, skipped = [], {}
    for name, contender in setting.registry.items():
        if not takes_part(case, contender):
            continue
        reason = contender.why_not(setting.device)
        if reason is None and contender.slow_build and setting.short:
            if (case.work, name) in setting.built_slowly:
                continue
            setting.built_slowly.add((case.work, name))
        if reason:
            skipped[name] = reason
        else:
            run.append(contender)
    return run, skipped


def run_case(case: Case, setting: Setting) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of one case, and why contenders are missing.

    Args:
        case: the shape.
        setting: the device, the contenders, its roofs.

    Raises:
        SAMLError: this package's own result is wrong.
    """
    running, skipped = chosen(case, setting)
    stage = Stage(case, setting.device, setting.dtype)
    trains: dict[str, list[Step]] = {}
    single: dict[str, Step] = {}  # a graph's memory is its own, so the peak is an eager call's
    lengths: dict[str, int] = {}
    layers: dict[str, Layer] = {}
    grad = torch.enable_grad() if case.mode == "train" else torch.no_grad()
    with grad, current(setting.device):
        for contender in running:
            name = contender.name
            try:
                made = [contender.build(operands) for operands in stage.operands]
                gated = contender.experts == "gated"
                steps: list[Step] = [
                    partial(stage.step, i, layer, gated) for i, layer in enumerate(made)
                ]
                for step in steps:
                    step()
                single[name] = steps[-1]
                if case.mode == "graph":
                    lengths[name], steps = len(steps), [captured(steps)]
            except Exception as error:
                if name in OURS:
                    raise
                skipped[name] = f"failed: {str(error).strip().partition(chr(10))[0]}"
                continue
            trains[name], layers[name] = steps, made[-1]
        times = interleaved(
            trains, setting.device, setting.rounds, lengths=lengths,
            sampler=partial(sample, launches=case.mode != "graph"),
        )  # fmt: skip
        rows = []
        for contender in running:
            name = contender.name
            if name not in times:
                continue
            off = stage.error(contender, trains[name], layers[name])
            if not off < stage.tolerance(contender):
                skipped[name] = f"wrong result: off by {off:.1e}"
                if name in OURS:
                    raise SAMLError(f"{case.label}: {name} is {skipped[name]}")
                continue
            stage.forget(-1, layers[name])
            cost = stage.cost(contender)
            floor = setting.roofs.floor(cost)
            rows.append(
                vars(case) | {"contender": name, **times[name].to_dict()} | {
                    "samples_us": [round(s, 2) for s in times[name].samples],
                    "backend": stage.backend(contender), "error": float(f"{off:.2e}"),
                    "bytes": round(cost.bytes), "flop": cost.flop,
                    "floor_us": round(floor, 2),
                    "of_roofline": round(floor / times[name].median, 4),
                    "peak_bytes": peak_memory(single[name], setting.device),
                    "ratios": {
                        other: round(times[name].ratio(times[other]), 4)
                        for other in times
                        if other != name and (name.startswith("saml") or other == "dense")
                    },
                }
            )  # fmt: skip
    return rows, skipped


def run_cases(
    cases: Sequence[Case],
    setting: Setting,
    results: Results,
    minutes: float = 1e9,
    on_case: Callable[[int, Case], None] | None = None,
) -> bool:
    """Run cases one after the other, adding to `results`, which writes itself after each.

    `on_case` is given the number of cases done and the next one.

    Returns:
        Whether there was time for all of them.
    """
    deadline = time.monotonic() + 60 * minutes
    for done, case in enumerate(cases):
        if time.monotonic() > deadline:
            results.unfinished(minutes)
            return False
        if on_case:
            on_case(done, case)
        rows, skipped = run_case(case, setting)
        results.add(case.work, WORKS[case.work].title, rows, skipped)
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return True
