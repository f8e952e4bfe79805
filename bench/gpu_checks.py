"""Checks that need a GPU, for gpu_check.py: compiled tests, sanitizers, recomputation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saml_kernels import quantize
from saml_kernels.timing import timed
from saml_kernels.triton import backward, configs, forward
from saml_kernels.triton.tuning import Problem

__all__ = ["check_kernels", "collected", "recomputation", "sanitize", "small_case", "verdict"]

HERE = Path(__file__).resolve().parent
SANITIZER_SECONDS = 75
COMPILE_SECONDS = 180  # of the small case without one
FOUND = 9  # a sanitizer's exit code
DONE = "small case: done"
SUMMARIES = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"\((\d+) errors?, \d+ warn"}
FUZZ = 8  # random shapes of each kind in each process
PLAIN = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
# Without pyproject's -q: a second one makes --collect-only count tests instead of naming them.
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider"]


def collected() -> tuple[list[str], str]:
    """Names of the kernels' tests (none where that fails), and all that pytest said."""
    listed = subprocess.run(
        [*PYTEST, "--collect-only", "tests/kernels", "tests/test_lookup.py"],
        capture_output=True, text=True, env=PLAIN, cwd=HERE.parent,
    )  # fmt: skip
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    return [] if listed.returncode else names, listed.stdout + listed.stderr


def check_kernels(minutes: float) -> str:
    """tests/kernels, shared out among processes (compiling takes long); "passed" or what else."""
    tests, said = collected()
    fixed = [t for t in tests if "random_shapes" not in t]
    if not fixed:
        return f"failed: {said[-2000:]}"
    workers = max(1, min(16, (os.cpu_count() or 2) - 1))
    shares = [[*PYTEST, *fixed[i::workers]] for i in range(workers)]
    shares += [
        [*PYTEST, "tests/kernels", "-k", "random_shapes", f"--hypothesis-seed={i}"]
        for i in range(workers)
    ]
    deadline = time.monotonic() + 60 * minutes

    def run(command: list[str]) -> str:
        try:
            left = max(1.0, deadline - time.monotonic())
            done = subprocess.run(
                command, capture_output=True, text=True, env=PLAIN | {"FUZZ": str(FUZZ)},
                timeout=left, cwd=HERE.parent,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "unfinished"
        # 5: nothing to run, where there are fewer tests than processes.
        return "passed" if done.returncode in (0, 5) else f"failed: {done.stdout[-4000:]}"

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(run, [s for s in shares if len(s) > len(PYTEST)]))
    bad = [f for f in found if f.startswith("failed")]
    late = found.count("unfinished")
    if bad:
        return bad[0]
    done = f"{len(fixed)} tests and {2 * FUZZ * workers} random shapes"
    return f"passed: {done}" if not late else f"unfinished: {late} of {len(found)} shares of {done}"


def sanitize() -> dict[str, str]:
    """compute-sanitizer's tools -> "passed" or what else."""
    case = [sys.executable, str(HERE / "gpu_check.py"), "--do", "small-case"]
    how: dict[str, Any] = {"capture_output": True, "text": True}
    try:
        plain = subprocess.run(case, env=PLAIN, timeout=COMPILE_SECONDS, **how)
    except subprocess.TimeoutExpired:
        return {"small case": f"unfinished after {COMPILE_SECONDS} s"}
    if plain.returncode:
        return {"small case": f"failed: {(plain.stdout + plain.stderr)[-2000:]}"}
    found = {"small case": "passed"}
    sanitizer = shutil.which("compute-sanitizer")
    # Each tensor by itself in device memory: a neighbour in PyTorch's cache hides a stray access.
    alone = PLAIN | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            found[tool] = "not run: compute-sanitizer is not installed"
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *case]
        try:
            done = subprocess.run(command, env=alone, timeout=SANITIZER_SECONDS, **how)
        except subprocess.TimeoutExpired:
            found[tool] = f"not run: unfinished after {SANITIZER_SECONDS} s"
            continue
        found[tool] = verdict(tool, done.returncode, done.stdout + done.stderr)
    return found


def verdict(tool: str, code: int, output: str) -> str:
    """What a sanitizer found, and not whether it could look: that is no fault of a kernel's."""
    lines = [line for line in output.splitlines() if line.strip(" =")]
    for line in lines:
        if "Device not supported" in line:
            return f"not run: {line.strip(' =')}"
    errors = re.search(SUMMARIES[tool], output)
    if errors and int(errors[1]):
        return f"failed: {output[-2000:]}"
    if errors and code in (0, FOUND) and DONE in output:
        return "passed"
    said = [line for line in lines if "SUMMARY" not in line] or [f"exit code {code}"]
    return f"not run: {said[-1].strip(' =')}"


def small_case() -> None:
    """Every kernel at the edges of its tiles, for the sanitizers."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    for k, speakers in ((128, None), (100, 3)):  # blocks that end with the rows, and that do not
        m, n, e, r = 37, 120, 3, 4
        lead = () if speakers is None else (speakers,)
        weight = quantize(torch.randn(n, k)).to("cuda")
        x, dy, bias = (torch.randn(*s, **kind) for s in ((m, k), (m, n), (n,)))
        a, b = torch.randn(*lead, e, r, k, **kind), torch.randn(*lead, e, n, r, **kind)
        gates, router = torch.rand(m, e, **kind), torch.randn(*lead, e, k, **kind)
        index = None if speakers is None else torch.arange(m, device="cuda").int() % speakers
        coded = [quantize(t.cpu().float(), "int8", 128, False).to("cuda") for t in (a, b)]
        for route in configs.ROUTES:
            how: dict[str, Any] = {"speakers": index, "route": route}
            for given, routing in ((gates, None), (router, (2, 1.0))):
                forward(x, weight, a, b, given, bias, 1.0, **how, routing=routing)
                backward(dy, x, weight, a, b, given, 1.0, (True,) * 4, **how, routing=routing)
        forward(x, weight, coded[0], coded[1], gates, bias, 1.0, speakers=index)
    torch.cuda.synchronize()
    print(DONE)


def recomputation() -> list[dict[str, Any]]:
    """What keeping P spares the backward, and the bytes that it holds for it."""
    rows = []
    for m, n, k in ((1500, 2048, 512), (12000, 2048, 512), (12000, 5120, 1280)):
        call = Problem(m, n, k, experts=4, rank=16)
        found = {
            name: timed(partial(call.backward, keep=keep))
            for name, keep in (("backward, P kept", True), ("P made again", False))
        }
        rows.append({"m": m, "n": n, "k": k, "bytes_if_kept": 4 * m * 64, **found})
    return rows
