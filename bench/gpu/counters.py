"""Nsight Compute on one layer of the encoder and one of decoding, for check.py."""

from __future__ import annotations

import csv
import shutil
import subprocess
from typing import Any

import torch

from bench.gpu.checks import PLAIN
from bench.layers.cases import FRAMES, Case
from bench.layers.contenders import Operands, own_contenders
from bench.place import as_module, environment

__all__ = ["METRICS", "counted", "counters", "read_counters"]

SECONDS = 120  # for each case
CASES = {
    "P1": Case("P1", "eager", FRAMES, 5120, 1280),
    "P2": Case("P2", "eager", 1, 5120, 1280),
}
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)


def counters() -> dict[str, Any]:
    """Work -> its case and every kernel's metrics, or why there are none."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return dict.fromkeys(CASES, "not run: no ncu")
    found: dict[str, Any] = {}
    for work, case in CASES.items():
        command = [
            # The card's clocks are left as they are; ncu would set them.
            ncu, "--clock-control", "none",
            "--csv", "--print-units", "base", "--profile-from-start", "off",
            "--metrics", ",".join(METRICS),
            *as_module("bench.gpu.check"), "--step", f"counted-{work}",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment(PLAIN), timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            found[work] = f"not run: unfinished after {SECONDS} s"
            continue
        kernels = read_counters(done.stdout)
        if kernels and done.returncode == 0:
            found[work] = vars(case) | {"kernels": kernels}
            continue
        said = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        why = [line for line in said if "==ERROR==" in line] or said
        found[work] = f"not run: {why[-1]}"
    return found


def read_counters(output: str) -> list[dict[str, Any]]:
    """What `ncu --csv` printed, one entry a launch, in their order."""
    found: dict[str, dict[str, Any]] = {}
    # The program's own lines and ncu's stand between; those of the table alone are quoted.
    for row in csv.DictReader(line for line in output.splitlines() if line.startswith('"')):
        kernel = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        kernel[row["Metric Name"]] = _number(row["Metric Value"])
    return list(found.values())


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text  # "n/a", where a device does not count that


def counted(work: str) -> None:
    """The process that ncu watches: one call of the layer with experts, compiled beforehand."""
    device = torch.device("cuda")
    case = CASES[work]
    operands = Operands.random(case, device, torch.float16)
    layer = next(c for c in own_contenders() if c.name == "saml + experts").build(operands)
    x = torch.randn(case.m, case.k, device=device, dtype=torch.float16)
    gates = torch.rand(case.m, case.experts, device=device, dtype=torch.float16)
    layer.call(x, gates)
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        layer.call(x, gates)
        torch.cuda.synchronize()
