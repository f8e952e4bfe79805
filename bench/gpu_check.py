"""One call for whoever has a GPU: checks, then times, then (with --tune) tunes every kernel.

    python bench/gpu_check.py --out bench/results [--tune] [--minutes 9]

1. tests/kernels compiled for this device, compute-sanitizer (memcheck, racecheck) on a small case
   where it is installed, and CUDA-graph capture and replay. Nothing is timed if one of them fails.
2. Forward and backward at Whisper's widths, 4 experts of rank 16: every route of the backend beside
   dense float16 cuBLAS without experts, and the roofline floor. Device events, medians; weights
   rotate past the L2 cache; the result of the last timed call is compared with float64.
3. --tune: as `saml bench --tune`, with a copy of the table among the results.

Results so far are on disk whenever it stops.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from saml_kernels import saml_linear, saml_linear_routed
from saml_kernels.timing import timed
from saml_kernels.triton import configs
from saml_kernels.triton.tuning import CACHE_BYTES, Problem, tune

SHAPES = ((384, 384), (512, 2048), (768, 3072), (1280, 1280), (1280, 5120), (5120, 1280))  # K, N
TOKENS = (1, 4, 8, 16, 64, 256, 1500, 12000)
EXPERTS, RANK = 4, 16
TOLERANCE = 2e-3
# Dense float16 TFLOP/s and TB/s by name, from the vendors' data sheets.
ROOFS = {"H200": (989, 4.8), "H100": (989, 3.35), "A100": (312, 2.04), "4090": (165, 1.01)}


def environment() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
        "cuda": torch.version.cuda, "triton": triton.__version__, "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"), "experts": EXPERTS, "rank": RANK,
    }  # fmt: skip


def check_correctness() -> dict[str, str]:
    """Name of each check -> "passed", or why it was not run. Stops at a failure."""
    found: dict[str, str] = {}
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"FUZZ": "60"}
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels", "tests/test_lookup.py"]
    subprocess.run(tests, check=True, env=plain)
    found["tests/kernels"] = "passed"
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            found[tool] = "not run: compute-sanitizer is not installed"
            continue
        case = [sys.executable, __file__, "--small-case"]
        subprocess.run([sanitizer, "--tool", tool, "--error-exitcode", "9", *case], check=True)
        found[tool] = "passed"
    check_graph()
    found["CUDA graph"] = "passed"
    return found


def small_case() -> None:
    """Every kernel once, for the sanitizers."""
    torch.manual_seed(0)
    call = Call(40, 128, 192, 1)
    router = torch.randn(EXPERTS, 192, device="cuda", dtype=torch.float16, requires_grad=True)
    for route in configs.ROUTES:
        call.forward(route)
        call.backward(route)
        saml_linear_routed(
            call.x, call.weights[0], call.a, call.b, router, backend="triton"
        ).sum().backward()
    torch.cuda.synchronize()


def check_graph() -> None:
    """Captured and replayed on new input, the operator gives what it gives eagerly."""
    call = Call(5, 512, 512, 1)
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


class Call(Problem):
    """A shape with its peer and its floor."""

    def __init__(self, m: int, n: int, k: int, copies: int | None = None) -> None:
        super().__init__(m, n, k, experts=EXPERTS, rank=RANK, copies=copies)
        dense = min(len(self.weights), math.ceil(CACHE_BYTES / (n * k * 2)))
        self.dense = [self.source.half() for _ in range(dense)]

    def cublas(self) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self.turn += 1
            return F.linear(self.x, self.dense[self.turn % len(self.dense)], self.bias)

        return run

    def floor(self) -> float | None:
        """Microseconds below which this device cannot run the forward."""
        name = torch.cuda.get_device_name()
        roof = next((r for key, r in ROOFS.items() if key in name), None)
        if roof is None:
            return None
        m, n, k, r = self.m, self.n, self.k, EXPERTS * RANK
        flop = 2 * m * (n * k + r * (n + k))
        size = 0.516 * n * k + 2 * (m * (n + k + EXPERTS) + r * (n + k) + n)
        return max(flop / roof[0] / 1e6, size / roof[1] / 1e6)


def measure(call: Call) -> dict[str, Any]:
    """A row of the table: every route, cuBLAS, the floor."""
    expected = call.truth()["forward"]
    row: dict[str, Any] = {"m": call.m, "k": call.k, "n": call.n, "floor_us": call.floor()}
    row["cublas"] = timed(call.cublas())
    for route in (None, *configs.ROUTES):
        if route == "decode" and call.m > 64:
            continue
        row[f"forward {route or 'chosen'}"] = timed(partial(call.forward, route))
        error = (call.forward(route).double() - expected).norm() / expected.norm()
        assert error < TOLERANCE, f"{row}: {route} is off by {error:.1e} after timing"
        row[f"backward {route or 'chosen'}"] = timed(partial(call.backward, route), rounds=10)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--small-case", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device; run it on a machine that has one", file=sys.stderr)
        return 2
    if o.small_case:
        small_case()
        return 0
    deadline = time.monotonic() + 60 * o.minutes
    about = environment()
    o.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = o.out / f"gpu-{name}-{about['date']}.json"
    result: dict[str, Any] = {"about": about, "checks": check_correctness(), "rows": []}
    for (k, n), m in itertools.product(SHAPES, TOKENS):
        if time.monotonic() > deadline:
            result["unfinished"] = f"stopped after {o.minutes} minutes"
            break
        result["rows"].append(measure(Call(m, n, k)))
        path.write_text(json.dumps(result, indent=1))
        row = result["rows"][-1]
        print(m, k, n, {key: v["median_us"] for key, v in row.items() if isinstance(v, dict)})
    path.write_text(json.dumps(result, indent=1))
    print(f"results: {path}")
    if o.tune:
        left = (deadline - time.monotonic()) / 60
        shapes = [(n, k) for k, n in SHAPES]
        table, rows = tune(shapes, minutes=left)
        copy = o.out / f"{configs.device_traits(torch.device('cuda', 0))[0]}.json"
        copy.write_text(table.read_text())
        print(f"tuning table: {table}, {rows} rows; a copy to ship: {copy}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
