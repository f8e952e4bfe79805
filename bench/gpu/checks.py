"""Checks for check.py: real shapes, compiled tests, sanitizers, recomputation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.processes import shared_out, workers
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
    "read_tests",
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
FUZZ = 3  # random shapes of each kind in each process, which compile kernels for each
TOLD = 20  # tests that went wrong, by what they said
PLAIN = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-o",
    "addopts=--import-mode=importlib",
    "-p",
    "no:cacheprovider",
]
HEAVY = "test_real_layers"  # compiles for minutes what `shapes` checks some of: last
ENDED = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.MULTILINE)

NAMES = ("y", "dx", "da", "db", "dgates")
TOLERANCE = {"float16": 1e-2, "bfloat16": 4e-2, "float32": 1e-3}  # relative to the norm
WORST = 5  # times that, of the worst row, relative to the mean row: a tile is few of the numbers


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
    tolerance = TOLERANCE[shape.dtype]
    for key, kind, most in (("errors", 0, tolerance), ("worst_rows", 1, WORST * tolerance)):
        offs = {name: off[kind] for name, off in errors.items()}
        worst = max(offs, key=lambda name: offs[name])
        found[key] = {name: float(f"{off:.2e}") for name, off in offs.items()}
        if not offs[worst] < most and "failed" not in found:
            where = " in a row" if kind else ""
            found["failed"] = f"{worst} is off by {offs[worst]:.1e}{where}"
    return found


def _errors(
    shape: Shape, route: str | None, device: torch.device
) -> dict[str, tuple[float, float]]:
    """By name: the error of all of it, and of its worst row."""
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

    kept: dict[str, Sequence[Tensor]] = {}

    def keeping(name: str, make: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        def made() -> Sequence[Tensor]:
            kept[name] = make()
            return kept[name]

        return made

    renew()
    whole = poisoned_errors(keeping("found", run), renew, keeping("truth", truth))
    rows = [worst_row(f, t) for f, t in zip(kept["found"], kept["truth"], strict=True)]
    return dict(zip(NAMES, zip(whole, rows, strict=True), strict=True))


def worst_row(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row (of the last dimension) over the mean length of a row."""
    off = (found.detach().double() - expected).flatten(0, -2).norm(dim=-1)
    lengths = expected.flatten(0, -2).norm(dim=-1).square().mean().sqrt()
    worst = float(off.max() / lengths.clamp(min=1e-30))
    return worst if worst == worst else float("inf")


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
    tasks = [(s, route, device_type) for s in shapes for route in (None, *configs.ROUTES)]
    rows: list[dict[str, Any]] = []
    for row in shared_out(check_shape, tasks, seconds):
        shape, route, _ = tasks[row.pop("task")]
        rows.append({**asdict(shape), "route": route or "the operator", **row})
        put(rows)
    bad = [f"{_named(row)}: {row['failed']}" for row in rows if "failed" in row]
    done = f"{len(rows)} of {len(tasks)} calls"
    if bad:
        return f"failed: {len(bad)} of {done}; " + "; ".join(bad[:6])
    return f"{'passed' if len(rows) == len(tasks) else 'unfinished'}: {done}"


def _named(row: dict[str, Any]) -> str:
    shape = f"{row['m']} x {row['k']} -> {row['n']}, {row['experts']} x {row['rank']}"
    return f"{row['route']} at {shape}, {row['dtype']}, gates {row['gates']}"


def collected() -> tuple[list[str], str]:
    """Names of the kernels' tests (none where that fails), and all that pytest said."""
    # Without pyproject's -q: a second one makes --collect-only count tests instead of naming them.
    listed = subprocess.run(
        [*PYTEST, "-q", "--collect-only", SUITE, "tests/kernels/backends/test_lookup.py"],
        capture_output=True, text=True, env=PLAIN, cwd=REPOSITORY,
    )  # fmt: skip
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    return [] if listed.returncode else names, listed.stdout + listed.stderr


def check_kernels(
    seconds: float, only: Sequence[str] = (), put: Callable[[dict[str, Any]], None] | None = None
) -> str:
    """The kernels' tests, shared out among processes (compiling takes long); one line about them.

    A test that fails or dies may take its process's device with it: those after it run in another.

    Args:
        seconds: what is not done then is left.
        only: names of tests to run in place of all, under Triton's interpreter where that is on.
        put: is given what came of them so far, again and again: how many, and what went wrong.
    """
    started = time.monotonic()
    tests, said = (list(only), "") if only else collected()
    fixed = [t for t in tests if "random_shapes" not in t]
    if not fixed:
        return f"failed: {said[-2000:]}"
    count = workers()
    light, heavy = ([t for t in fixed if (HEAVY in t) == late] for late in (False, True))
    shares = [light[i::count] for i in range(count)]
    if not only:
        shares += [[SUITE, "-k", "random_shapes", f"--hypothesis-seed={i}"] for i in range(count)]
    shares += [heavy[i::count] for i in range(count)]
    shares = [share for share in shares if share]
    deadline, guard = started + seconds, threading.Lock()
    ended: dict[str, int] = {}
    wrong: dict[str, str] = {}
    env = (dict(os.environ) if only else PLAIN | {"FUZZ": str(FUZZ)}) | {
        "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def run(share: list[str]) -> bool:
        """Whether all of it came to an end."""
        while share:
            left = deadline - time.monotonic()
            if left < 1:
                return False
            done, failed, output, whole = _pytest(share, left, env)
            with guard:
                for kind, number in done.items():
                    ended[kind] = ended.get(kind, 0) + number
                for name in failed[: TOLD - len(wrong)]:
                    wrong[name] = output[-3000:]
                if put:
                    put({**ended, "wrong": wrong})
            if whole is None:
                return False
            share = whole
        return True

    with ThreadPoolExecutor(count) as pool:
        finished = [job.result() for job in as_completed([pool.submit(run, s) for s in shares])]
    tried = ", ".join(f"{number} {kind}" for kind, number in sorted(ended.items()))
    if wrong:
        return f"failed: {tried}; " + "; ".join(list(wrong)[:6])
    if not all(finished):
        late = finished.count(False)
        return f"unfinished: {late} of {len(shares)} shares of {len(fixed)} tests; {tried}"
    return f"passed: {tried}"


def _pytest(
    share: list[str], seconds: float, env: dict[str, str]
) -> tuple[dict[str, int], list[str], str, list[str] | None]:
    """Run tests up to the first that fails: how many ended how, which failed, and what was said.

    The last is what remains to run, None where time is up.
    """
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [*PYTEST, "-v", "-x", *share], stdout=out, stderr=subprocess.STDOUT, env=env,
            cwd=REPOSITORY,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
            process.wait()
        out.seek(0)
        output = out.read()
    done, failed, ended = read_tests(output)
    if code is None:
        return done, failed, output, None
    if code not in (0, 1, 5) and not failed:  # 5: nothing to run
        lines = {line.partition(" ")[0] for line in output.splitlines()}
        begun = [t for t in share if t not in ended and t.partition(" ")[0] in lines]
        failed = begun[:1] or [" ".join(share[:3])]  # which took the process with it
        done["died"] = 1
    if not failed:
        return done, failed, output, []
    # Random shapes are one share, which cannot go on from its middle.
    rest = [] if "-k" in share else [t for t in share if t not in ended and t not in failed]
    return done, failed, output, rest


def read_tests(output: str) -> tuple[dict[str, int], list[str], set[str]]:
    """Of `pytest -v`: how many tests ended how, which went wrong, and all that ended."""
    ends = ENDED.findall(output)
    counts: dict[str, int] = {}
    for _, how in ends:
        counts[how.lower()] = counts.get(how.lower(), 0) + 1
    wrong = dict.fromkeys(name for name, how in ends if how in ("FAILED", "ERROR"))
    return counts, list(wrong), {name for name, _ in ends}


def sanitize(put: Callable[[dict[str, str]], None] = lambda found: None) -> dict[str, str]:
    """compute-sanitizer's tools -> "passed" or what else; `put` is given those so far."""
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
        else:
            found[tool] = verdict(tool, done.returncode, done.stdout + done.stderr)
        put(found)
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


def recomputation(
    put: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """What keeping P spares the backward, and the bytes that it holds; `put` as in `sanitize`."""
    rows: list[dict[str, Any]] = []
    for m, n, k in ((1500, 2048, 512), (12000, 2048, 512), (12000, 5120, 1280)):
        call = Problem(m, n, k, experts=4, rank=16)
        found = {
            name: timed(partial(call.backward, keep=keep))
            for name, keep in (("backward, P kept", True), ("P made again", False))
        }
        rows.append({"m": m, "n": n, "k": k, "bytes_if_kept": 4 * m * 64, **found})
        put(rows)
    return rows
