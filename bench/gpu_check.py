"""One call for whoever has a GPU: checks, then times, then (with --tune) tunes every kernel.

    python bench/gpu_check.py --out bench/results [--tune] [--minutes 9]

1. tests/kernels compiled for this device, compute-sanitizer (memcheck, racecheck) on a small case
   where it is installed, and CUDA-graph capture and replay. Nothing is timed if one of them fails.
2. Forward and backward at Whisper's widths, 4 experts of rank 16: every route of the backend beside
   dense float16 cuBLAS without experts, and the roofline floor. Device events, medians; weights
   rotate past the L2 cache; the result of the last timed call is compared with float64.
3. --tune: tiles for each shape, written as a tuning table.

Results so far are on disk whenever it stops.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from saml_kernels import saml_linear
from saml_kernels import triton as backend
from saml_kernels.quant import QuantizedTensor, quantize
from saml_kernels.reference import saml_linear_reference
from saml_kernels.triton import configs

SHAPES = ((384, 384), (512, 2048), (768, 3072), (1280, 1280), (1280, 5120), (5120, 1280))  # K, N
TOKENS = (1, 4, 8, 16, 64, 256, 1500, 12000)
EXPERTS, RANK, SCALING = 4, 16, 1.0
L2_BYTES = 128 << 20  # more than any card's; weights in rotation exceed it
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
    for route in configs.ROUTES:
        call.forward(route)()
        call.backward(route)()
    torch.cuda.synchronize()


def check_graph() -> None:
    """Captured and replayed on new input, the operator gives what it gives eagerly."""
    call = Call(5, 512, 512, 1)
    arguments = (call.weights[0], call.a, call.b, call.gates, call.bias, SCALING, "triton")
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


class Call:
    """One shape: random arguments, with enough copies of the weight to run past the L2 cache."""

    def __init__(self, m: int, n: int, k: int, copies: int | None = None) -> None:
        d: dict[str, Any] = {"dtype": torch.float16, "device": "cuda"}
        self.m, self.n, self.k = m, n, k
        packed = n * k // 2
        copies = copies or max(1, min(64, math.ceil(L2_BYTES / packed)))
        dense = torch.randn(n, k, device="cuda") / math.sqrt(k)
        one = quantize(dense)
        self.weights: list[QuantizedTensor] = [one]
        for _ in range(copies - 1):
            self.weights.append(
                QuantizedTensor.from_parts(
                    one.codes.clone(), one.absmax.clone(), one.nested_absmax, one.offset,
                    list(one.shape), one.format, one.block_size,
                )
            )  # fmt: skip
        self.dense = [dense.half() for _ in range(min(copies, math.ceil(L2_BYTES / (n * k * 2))))]
        self.x, self.dy = torch.randn(m, k, **d), torch.randn(m, n, **d)
        self.a = torch.randn(EXPERTS, RANK, k, **d) / math.sqrt(k)
        self.b = torch.randn(EXPERTS, n, RANK, **d) / math.sqrt(RANK)
        self.gates, self.bias = torch.rand(m, EXPERTS, **d), torch.randn(n, **d)
        self.turn = 0

    def weight(self) -> QuantizedTensor:
        self.turn += 1
        return self.weights[self.turn % len(self.weights)]

    def forward(self, route: str | None) -> Callable[[], Tensor]:
        rest = (self.a, self.b, self.gates, self.bias, SCALING, None, None, route)
        return lambda: backend.forward(self.x, self.weight(), *rest)

    def backward(self, route: str | None) -> Callable[[], Tensor]:
        rest = (self.a, self.b, self.gates, SCALING, (True,) * 4, None, None, route)

        def run() -> Tensor:
            dx = backend.backward(self.dy, self.x, self.weight(), *rest)[0]
            assert dx is not None
            return dx

        return run

    def cublas(self) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self.turn += 1
            return F.linear(self.x, self.dense[self.turn % len(self.dense)], self.bias)

        return run

    def truth(self) -> Tensor:
        wide = [t.double() for t in (self.x, self.a, self.b, self.gates, self.bias)]
        x, a, b, g, bias = wide
        weight = self.weights[0].dequantize(torch.float64)
        return saml_linear_reference(x, weight, a, b, g, bias, SCALING)

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


def timed(run: Callable[[], Tensor], rounds: int = 30) -> dict[str, float]:
    """Median and quartiles in microseconds, by device events around a train of calls."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    train = max(1, min(50, int(2.0 / max(1e-3, begin.elapsed_time(end)))))
    times = []
    for _ in range(rounds):
        begin.record()
        for _ in range(train):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / train)
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_us": round(middle, 2), "low_us": round(low, 2), "high_us": round(high, 2)}


def measure(call: Call) -> dict[str, Any]:
    """A row of the table: every route, cuBLAS, the floor."""
    expected = call.truth()
    row: dict[str, Any] = {"m": call.m, "k": call.k, "n": call.n, "floor_us": call.floor()}
    row["cublas"] = timed(call.cublas())
    for route in (None, *configs.ROUTES):
        run = call.forward(route)
        row[f"forward {route or 'chosen'}"] = timed(run)
        error = (run().double() - expected).norm() / expected.norm()
        assert error < TOLERANCE, f"{row}: {route} is off by {error:.1e} after timing"
        row[f"backward {route or 'chosen'}"] = timed(call.backward(route), rounds=10)
    return row


def tune(call: Call, deadline: float) -> dict[str, Any]:
    """The fastest forward configuration of this shape, as an entry of a tuning table."""
    sizes = ((16,), (32,), (64,), (128,))
    rows = [b for (b,) in sizes if b <= max(16, 2 * call.m)]
    best: tuple[float, configs.Config] | None = None
    tried = itertools.product(rows, (32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 4, 8))
    original = configs.choose
    for block_m, block_o, warps, stages, split in tried:
        if time.monotonic() > deadline:
            break
        route = "split" if split > 1 else "fused"
        config = configs.Config(route, block_m, block_o, 64, split, warps, stages)
        try:
            backend.choose = lambda *_, c=config: c  # type: ignore[assignment]
            found = timed(call.forward(None), rounds=5)["median_us"]
        except triton.runtime.errors.OutOfResources:
            continue
        finally:
            backend.choose = original
        if best is None or found < best[0]:
            best = (found, config)
    scratch = timed(call.forward("scratch"), rounds=5)["median_us"]
    if best is None or scratch < best[0]:
        best = (scratch, replace(configs.Config(), route="scratch", split=1))
    return {
        "m": call.m, "n": call.n, "k": call.k, **asdict(best[1]), "microseconds": best[0]
    }  # fmt: skip


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
        capability, _ = configs.device_traits(torch.device("cuda", 0))
        default = json.loads(
            Path(configs.__file__).with_name("tables").joinpath("default.json").read_text()
        )
        table: dict[str, Any] = {"about": about, "forward": [], "backward": default["backward"]}
        for (k, n), m in itertools.product(SHAPES, TOKENS):
            if time.monotonic() > deadline:
                break
            table["forward"].append(tune(Call(m, n, k), deadline))
        target = o.out / f"{capability}.json"
        target.write_text(json.dumps(table, indent=1))
        print(f"tuning table: {target}; copy it to {configs.user_table(capability)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
