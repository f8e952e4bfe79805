"""Checks for check.py: real shapes, compiled tests, sanitizers, recomputation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from bench.gpu.results import one_line
from bench.layers.checks import poisoned_errors
from bench.place import REPOSITORY, as_module, environment
from saml_kernels import quantize, saml_linear, saml_linear_routed
from saml_kernels.backends.reference import gates_from_logits, saml_linear_reference
from saml_kernels.backends.triton import configs
from saml_kernels.backends.triton.backend import backward, forward
from saml_kernels.backends.triton.tuning import Problem
from saml_kernels.timing import timed

__all__ = [
    "REAL_SHAPES",
    "SUITE",
    "Shape",
    "check_kernels",
    "check_shape",
    "check_shapes",
    "collected",
    "recomputation",
    "sanitize",
    "small_case",
    "verdict",
]  # fmt: skip

SUITE = "tests/kernels/backends/triton"
SANITIZER_SECONDS = 75
COMPILE_SECONDS = 180  # of the small case without one
FOUND = 9  # a sanitizer's exit code
DONE = "small case: done"
SUMMARIES = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"\((\d+) errors?, \d+ warn"}
FUZZ = 8  # random shapes of each kind in each process
PLAIN = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
# Without pyproject's -q: a second one makes --collect-only count tests instead of naming them.
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-o",
    "addopts=--import-mode=importlib",
    "-q",
    "-x",
    "-p",
    "no:cacheprovider",
]

NAMES = ("y", "dx", "da", "db", "dgates")
TOLERANCE = {"float16": 1e-2, "bfloat16": 4e-2, "float32": 1e-3}  # relative to the norm


@dataclass(frozen=True)
class Shape:
    """A layer as models have them: every pointer aligned, every size a multiple of 16.

    Attributes:
        m, n, k: tokens, out-features, in-features.
        experts, rank: E and r.
        dtype: what it runs in.
        gates: "given"; "sparse", given with all but two of them zero; "token", a token router.
    """

    m: int = 300
    n: int = 512
    k: int = 512
    experts: int = 4
    rank: int = 16
    dtype: str = "float16"
    gates: str = "given"


def _real_shapes() -> tuple[Shape, ...]:
    """By what has gone wrong before, then by what users have, then the rest."""
    first = [Shape(dtype=d, gates=g) for d in ("float16", "bfloat16") for g in ("given", "token")]
    default = [Shape(rank=4, dtype="bfloat16", gates="token"), Shape(experts=16, rank=4)]
    more = [
        Shape(m, n, k, gates=g)
        for m, n, k in ((1500, 2048, 512), (1500, 512, 2048), (1500, 1280, 1280), (5, 512, 512))
        for g in ("given", "token")
    ]
    return (*first, *default, Shape(gates="sparse"), *more)


REAL_SHAPES = _real_shapes()


def check_shape(shape: Shape, route: str | None, device_type: str) -> dict[str, Any]:
    """Relative errors of one route against float64; None is the operator as users call it.

    Everything is drawn anew, in place, between the call whose results are overwritten with NaN and
    the one that is judged.
    """
    found: dict[str, Any] = {**asdict(shape), "route": route or "the operator"}
    try:
        errors = _errors(shape, route, torch.device(device_type))
    except Exception as error:  # whatever a compiler or a driver says
        return found | {"failed": one_line(error)}
    worst = max(errors, key=lambda name: errors[name])
    found["errors"] = {name: float(f"{off:.2e}") for name, off in errors.items()}
    if not errors[worst] < TOLERANCE[shape.dtype]:
        found["failed"] = f"{worst} is off by {errors[worst]:.1e}"
    return found


def _errors(shape: Shape, route: str | None, device: torch.device) -> dict[str, float]:
    generator = torch.Generator(device).manual_seed(1)
    m, n, k, e, r = shape.m, shape.n, shape.k, shape.experts, shape.rank
    routed = shape.gates == "token"

    def empty(*size: int) -> Tensor:
        return torch.empty(size, device=device, dtype=getattr(torch, shape.dtype))

    weight = quantize(torch.randn(n, k, generator=generator, device=device) / k**0.5)
    x, dy, bias, a, b = empty(m, k), empty(m, n), empty(n), empty(e, r, k), empty(e, n, r)
    gates = empty(e, k) if routed else empty(m, e)  # or the router that makes them

    def renew() -> None:
        for tensor in (x, dy, bias, a, b, gates):
            tensor.normal_(generator=generator)
        for tensor in (a, b) + (gates,) * routed:
            tensor.div_(tensor.shape[-1] ** 0.5)
        if not routed:
            kept = 2 if shape.gates == "sparse" else None
            gates.copy_(gates_from_logits(gates, kept))

    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [t.detach().clone().requires_grad_() for t in tensors]

    def gradients(tensors: list[Tensor]) -> list[Tensor]:
        return [t.grad for t in tensors if t.grad is not None]

    def run() -> Sequence[Tensor]:
        if route is None:
            parts = leaves(x, a, b, gates)
            operator: Any = saml_linear_routed if routed else saml_linear
            y = operator(parts[0], weight, *parts[1:], bias, backend="triton")
            y.backward(dy)
            return [y.detach(), *gradients(parts)]
        how: dict[str, Any] = {"route": route, "routing": (None, 1.0) if routed else None}
        y = forward(x, weight, a, b, gates, bias, 1.0, **how)
        found: Any = backward(dy, x, weight, a, b, gates, 1.0, (True,) * 4, **how)
        return [y, *found]

    def truth() -> list[Tensor]:
        parts = leaves(*(t.double() for t in (x, a, b, gates)))
        inputs, lora_a, lora_b, given = parts
        if routed:
            given = gates_from_logits(inputs @ given.T)
        dense = weight.dequantize().double()
        y = saml_linear_reference(inputs, dense, lora_a, lora_b, given, bias.double())
        y.backward(dy.double())
        return [y.detach(), *gradients(parts)]

    renew()
    return dict(zip(NAMES, poisoned_errors(run, renew, truth), strict=True))


def check_shapes(
    shapes: Sequence[Shape],
    device_type: str,
    seconds: float,
    put: Callable[[list[dict[str, Any]]], None],
) -> str:
    """Every shape by every route, on all cores (compiling takes long); one line about them.

    Args:
        shapes: in the order of their importance.
        device_type: "cuda", or "cpu" under Triton's interpreter.
        seconds: what is not done then is left.
        put: is given all rows so far after each.
    """
    tasks = [(s, route) for s in shapes for route in (None, *configs.ROUTES)]
    rows: list[dict[str, Any]] = []
    workers = max(1, min(12, (os.cpu_count() or 2) - 1))
    # Not by fork: CUDA, once initialised, does not survive it.
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    futures = [pool.submit(check_shape, *task, device_type) for task in tasks]
    try:
        for future in as_completed(futures, timeout=seconds):
            rows.append(future.result())
            put(rows)
    except Exception as error:  # time is up, or a worker has died
        late = one_line(error)
        # They may be busy for long; whoever started this process ends what is left of it.
        pool.shutdown(wait=False, cancel_futures=True)
    else:
        late = ""
        pool.shutdown()
    bad = [f"{_named(row)}: {row['failed']}" for row in rows if "failed" in row]
    done = f"{len(rows)} of {len(tasks)} calls" + (f" ({late})" if late else "")
    if bad:
        return f"failed: {len(bad)} of {done}; " + "; ".join(bad[:6])
    return f"{'passed' if len(rows) == len(tasks) else 'unfinished'}: {done}"


def _named(row: dict[str, Any]) -> str:
    shape = f"{row['m']} x {row['k']} -> {row['n']}, {row['experts']} x {row['rank']}"
    return f"{row['route']} at {shape}, {row['dtype']}, gates {row['gates']}"


def collected() -> tuple[list[str], str]:
    """Names of the kernels' tests (none where that fails), and all that pytest said."""
    listed = subprocess.run(
        [*PYTEST, "--collect-only", SUITE, "tests/kernels/backends/test_lookup.py"],
        capture_output=True, text=True, env=PLAIN, cwd=REPOSITORY,
    )  # fmt: skip
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    return [] if listed.returncode else names, listed.stdout + listed.stderr


def check_kernels(seconds: float, only: Sequence[str] = ()) -> str:
    """The kernels' tests, shared out among processes (compiling takes long); "passed" or what else.

    `only` names tests to run in place of all, under Triton's interpreter where that is on.
    """
    if only:
        done = subprocess.run([*PYTEST, *only], capture_output=True, text=True, cwd=REPOSITORY)
        return "passed" if done.returncode == 0 else f"failed: {done.stdout[-2000:]}"
    started = time.monotonic()
    tests, said = collected()
    fixed = [t for t in tests if "random_shapes" not in t]
    if not fixed:
        return f"failed: {said[-2000:]}"
    workers = max(1, min(16, (os.cpu_count() or 2) - 1))
    shares = [[*PYTEST, *fixed[i::workers]] for i in range(workers)]
    shares += [
        [*PYTEST, SUITE, "-k", "random_shapes", f"--hypothesis-seed={i}"] for i in range(workers)
    ]
    deadline = started + seconds

    def run(command: list[str]) -> str:
        try:
            left = max(1.0, deadline - time.monotonic())
            done = subprocess.run(
                command, capture_output=True, text=True, env=PLAIN | {"FUZZ": str(FUZZ)},
                timeout=left, cwd=REPOSITORY,
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
    tried = f"{len(fixed)} tests and {2 * FUZZ * workers} random shapes"
    if late:
        return f"unfinished: {late} of {len(found)} shares of {tried}"
    return f"passed: {tried}"


def sanitize() -> dict[str, str]:
    """compute-sanitizer's tools -> "passed" or what else."""
    case = [*as_module("bench.gpu.check"), "--step", "small-case"]
    how: dict[str, Any] = {"capture_output": True, "text": True}
    try:
        plain = subprocess.run(case, env=environment(PLAIN), timeout=COMPILE_SECONDS, **how)
    except subprocess.TimeoutExpired:
        return {"small case": f"unfinished after {COMPILE_SECONDS} s"}
    if plain.returncode:
        return {"small case": f"failed: {(plain.stdout + plain.stderr)[-2000:]}"}
    found = {"small case": "passed"}
    sanitizer = shutil.which("compute-sanitizer")
    # Each tensor by itself in device memory: a neighbour in PyTorch's cache hides a stray access.
    alone = environment(PLAIN) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
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
