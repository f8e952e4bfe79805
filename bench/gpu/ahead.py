"""Compiling ahead of the steps that take times, on all cores, for check.py.

A step compiles what its cases need one kernel after the other, on one core, and most of its time
would go by. Triton keeps compiled kernels on disk, where the steps find them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.gpu.processes import shared_out
from bench.layers.cases import DEFAULTS, FRAMES, TRAINED, WORKS, Case, cases_of
from bench.layers.contenders import own_contenders
from bench.layers.harness import OURS, takes_part
from bench.layers.stage import Stage

__all__ = ["compile_ahead", "compile_case", "distinct"]

WORKS_BY_IMPORTANCE = ("P2", "P1", "P4", "P9", "P10", "P5", "P11")  # P3's kernels are P2's
MODEL_TOKENS = ((1, "eager"), (8, "eager"), (FRAMES, "eager"), (8 * FRAMES, "eager"),
                (8 * FRAMES, "train"), (256, "train"))  # fmt: skip


class _One(Stage):
    """One layer is as good as many: its kernels are the same."""

    def _copies(self) -> int:
        return 1


def distinct(device_type: str, full: bool, width: int = 512, **sizes: Any) -> list[Case]:
    """Cases of all works that launch something of their own, the models' layers among them.

    Args:
        device_type: "cuda", or "cpu" under Triton's interpreter.
        full: every width and number of tokens.
        width: of the models.
        sizes: as for `cases_of`.
    """
    found = [
        replace(case, mode="train" if case.mode == "train" else "eager")
        for work in WORKS_BY_IMPORTANCE
        for case in cases_of(work, device_type, not full, **sizes)
    ]
    if not sizes:
        of_models: dict[str, Any] = {"eager": ("P9", DEFAULTS), "train": ("P10", TRAINED)}
        for m, mode in MODEL_TOKENS:
            work, alike = of_models[mode]
            for n, k in WORKS[work].shapes(width):
                found.append(Case(work, mode, m, n, k, **alike))
    return list(dict.fromkeys(found))


def compile_case(case: Case, name: str, device: str) -> dict[str, Any]:
    """Run a contender of this package twice: a second call goes as a layer's later ones do."""
    where = torch.device(device)
    stage = _One(case, where, torch.float16 if where.type == "cuda" else torch.float32)
    contender = next(c for c in own_contenders() if c.name == name)
    with torch.set_grad_enabled(case.mode == "train"):
        layer = contender.build(stage.operands[0])
        for _ in range(2):
            stage.step(0, layer, contender.experts == "gated")
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return {"case": case.label, "contender": name}


def compile_ahead(
    cases: Sequence[Case], device: str, seconds: float, put: Callable[[Any], None]
) -> str:
    """Run each case once; one line about it.

    Args:
        cases: the most important first.
        device: where.
        seconds: what is not done then is left to the steps.
        put: is given what went wrong so far.
    """
    ours = [c for c in own_contenders() if c.name in OURS or c.speakers is not None]
    tasks = [(case, c.name, device) for case in cases for c in ours if takes_part(case, c)]
    done, bad = 0, []
    for row in shared_out(compile_case, tasks, seconds):
        case, name, _ = tasks[row.pop("task")]
        done += 1
        if "failed" in row:
            bad.append({**asdict(case), "contender": name, **row})
            put(bad)
    said = f"{done} of {len(tasks)} layers"
    if bad:
        return f"failed: {len(bad)} of {said}; {bad[0]['contender']}: {bad[0]['failed']}"
    return f"{'done' if done == len(tasks) else 'unfinished'}: {said}"
