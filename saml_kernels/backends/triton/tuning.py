"""Measures configurations on the present device and writes the user's own tuning table.

`saml bench --tune` calls this. The cost model says which candidates are worth a measurement. Each
of these is checked against the float64 equation before it is timed, on random numbers, with weights
in rotation so that none is read from the cache.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saml_kernels.backends.reference import Gating, saml_linear_reference
from saml_kernels.backends.reference import route as gates_of
from saml_kernels.backends.triton import costs
from saml_kernels.backends.triton.backend import backward, facts_of, forward
from saml_kernels.backends.triton.configs import (
    Config,
    bounded,
    choose,
    device_traits,
    forget_tables,
    from_hopper,
    user_table,
)
from saml_kernels.backends.triton.facts import weight_parts
from saml_kernels.backends.triton.launcher import triton_errors
from saml_kernels.backends.triton.plan import backward_plan
from saml_kernels.cuda import current
from saml_kernels.errors import SAMLError
from saml_kernels.files import write_json
from saml_kernels.quantization.tensor import QuantizedTensor, quantize
from saml_kernels.timing import timed

__all__ = ["DTYPES", "MINUTES", "TOKENS", "Problem", "candidates", "likely", "tune"]

# Those that are furthest apart come first: the time may not do for all.
TOKENS = (1, 1500, 16, 256, 4, 64, 6000)
CACHE_BYTES = 128 << 20  # more than any card's L2: weights in rotation exceed it
ROUNDS = 5
MINUTES = 2.5  # no row is started later: with the last one it stays under three
TRIALS = 8  # of a row
DTYPES = (torch.float16, torch.bfloat16)
GATING: Gating = (None, 1.0)  # a token router, as layers have by default
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}  # relative to the norm
TOO_LARGE = ("OutOfResources", "PTXASError")  # more than this device has

Clock = Callable[..., dict[str, float]]


class Problem:
    """One shape: random arguments, with enough copies of the weight for a rotation."""

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        *,
        experts: int = 4,
        rank: int = 16,
        copies: int | None = None,
        device: str | torch.device = "cuda",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self.m, self.n, self.k = m, n, k
        copies = copies or max(1, min(64, math.ceil(CACHE_BYTES / (n * k // 2))))
        self.source = torch.randn(n, k, device=device) / math.sqrt(k)
        one = quantize(self.source)
        self.weights: list[QuantizedTensor] = [one]
        for _ in range(copies - 1):
            self.weights.append(
                QuantizedTensor.from_parts(
                    one.codes.clone(), one.absmax.clone(), one.nested_absmax, one.offset,
                    list(one.shape), one.format, one.block_size,
                )
            )  # fmt: skip
        self.x, self.dy = torch.randn(m, k, **kind), torch.randn(m, n, **kind)
        self.a = torch.randn(experts, rank, k, **kind) / math.sqrt(k)
        self.b = torch.randn(experts, n, rank, **kind) / math.sqrt(rank)
        self.router = torch.randn(experts, k, **kind) / math.sqrt(k)
        self.gates = gates_of(self.x.float(), self.router.float(), *GATING)
        self.bias = torch.randn(n, **kind)
        self.projected = self.x.float() @ self.a.reshape(-1, k).T.float()
        self.turn = 0
        self.expected: dict[str, Tensor] | None = None

    def weight(self) -> QuantizedTensor:
        """The next of several equal weights, so that none is read from the cache."""
        self.turn += 1
        return self.weights[self.turn % len(self.weights)]

    def forward(self, route: str | Config | None = None) -> Tensor:
        """One forward of the operator: y [M, N]."""
        rest = (self.a, self.b, self.router, self.bias, 1.0)
        return forward(self.x, self.weight(), *rest, routing=GATING, route=route)

    def backward(self, route: str | Config | None = None, keep: bool = True) -> Tensor:
        """dX [M, K], with every other gradient made beside it.

        With `keep` as after a forward that kept P and the gates, which is what training runs.
        """
        weight, needs = self.weight(), (True,) * 4
        experts = (self.a, self.b, self.router)
        if not keep:
            dx = backward(
                self.dy, self.x, weight, *experts, 1.0, needs, routing=GATING, route=route
            )[0]
        else:
            facts = facts_of(self.x, weight, *experts, None, None, GATING, dy=self.dy, route=route)
            given = (self.dy, self.x, weight_parts(weight), *experts, None, 1.0)
            dx = backward_plan(facts, needs, True)(*given, self.projected, self.gates)[0]
        assert dx is not None
        return dx

    def truth(self) -> dict[str, Tensor]:
        """ "forward" and "backward" in float64."""
        x = self.x.double().requires_grad_()
        a, b, router, bias = (t.double() for t in (self.a, self.b, self.router, self.bias))
        dense = self.weights[0].dequantize(torch.float64)
        y = saml_linear_reference(x, dense, a, b, gates_of(x, router, *GATING), bias)
        y.backward(self.dy.double())
        assert x.grad is not None
        return {"forward": y.detach(), "backward": x.grad}

    def off(self, found: Tensor, direction: str) -> float:
        """The relative error of a result; the truth of a direction is computed once."""
        if self.expected is None:
            self.expected = self.truth()
        expected = self.expected[direction]
        return float((found.double() - expected).norm() / expected.norm())


def candidates(direction: str, m: int) -> Iterator[Config]:
    """The routes and tiles that are measured for `m` tokens."""
    forwards = direction == "forward"
    rows = [b for b in (16, 32, 64, 128) if b < 2 * max(16, m)][-2:]
    widths, depths = (32, 64, 128), (64,) if forwards else (32, 64)
    programs = ((4, 2), (4, 3), (4, 4), (8, 3)) if m <= 16 else ((4, 2), (4, 3), (8, 3))
    splits = (1, 2, 4, 8) if m <= 256 else (1,)
    for block_m, block_o, block_d, (warps, stages), split in product(
        rows, widths, depths, programs, splits
    ):
        routes = ["fused" if split == 1 else "split"] if m > 16 or not forwards else []
        if forwards and (m <= 16 or (m <= 256 and block_o == 64)):
            routes.append("decode")
        for route in routes:
            config = Config(route, block_m, block_o, block_d, split, warps, stages)
            yield config
            if forwards and m <= 64 and (warps, stages) == (4, 3):
                yield replace(config, scale="after")
                if route == "decode":
                    yield replace(config, dependent=True)
    if forwards and m <= 256:
        for block_o, block_d, stages, split in product((16, 32, 64), (128, 256), (2, 4), splits):
            yield Config("single", rows[0], block_o, block_d, 2 * split, 4, stages)
    if m > 256:
        for block_m, block_o, warps in ((64, 128, 4), (128, 128, 8), (128, 64, 4)):
            yield Config("dense", block_m, block_o, 64, 1, warps, 3)
        if forwards:
            for block_m, block_o, warps in ((128, 128, 8), (128, 256, 8), (128, 64, 8)):
                for stages in (3, 4):
                    yield Config(
                        "dense", block_m, block_o, 64, 1, warps, stages, loads="descriptors"
                    )
    if forwards and m > 64:
        for block_m, block_o, warps in ((64, 128, 8), (64, 64, 4), (32, 64, 4)):
            yield Config("stacked", block_m, block_o, 64, 1, warps)
    yield Config("scratch", split=1)


def likely(
    configs: Collection[Config],
    direction: str,
    m: int,
    n: int,
    k: int,
    device: costs.Device,
    most: int = TRIALS,
) -> list[Config]:
    """As many of `configs` as are worth a measurement: the fastest by the cost model.

    The best of each route, and of each way to load its tiles or to start it, is among them,
    whatever the model thinks of it.
    """
    if len(configs) <= most:
        return list(configs)
    cost = costs.forward if direction == "forward" else costs.backward
    ranked = sorted(configs, key=lambda c: cost(device, c, m, n, k))
    of_ways = {_way(c): c for c in reversed(ranked)}
    first = [c for c in ranked if of_ways[_way(c)] is c][:most]
    rest = [c for c in ranked if of_ways[_way(c)] is not c]
    return first + rest[: most - len(first)]


def _way(config: Config) -> tuple[str, str, bool]:
    return config.route, config.loads, config.dependent


def tune(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int] = TOKENS,
    *,
    device: str | torch.device = "cuda",
    minutes: float = MINUTES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    on_row: Callable[[int, int, dict[str, Any]], None] | None = None,
    clock: Clock = timed,
    tried: Callable[[str, int], Iterator[Config]] = candidates,
) -> tuple[Path, int]:
    """Write the fastest configurations of this device to the user's table.

    The table is written after each row, so that an interrupted run leaves what it found. Rows of an
    earlier run are kept, and repeated after those that it lacks: call again to go on.

    Args:
        shapes: weights (out-features, in-features); all of them come before the next of `tokens`.
        tokens: numbers of rows, the most wanted first.
        device: to measure on.
        minutes: no row is started later than this.
        dtypes: of the activations; a configuration goes by the geometric mean of its times in them.
        on_row: called with (rows done, rows in all, the row). "before_microseconds" in it is of
            what was chosen so far, None where that does not run here.
        clock: as `timed`; called with (call, rounds, device=).
        tried: as `candidates`.

    Returns:
        The table's path, and how many rows were measured.

    Raises:
        SAMLError: a configuration gives a wrong result.
    """
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    capability, _, name = device_traits(where)
    path = user_table(capability, name)
    table: dict[str, Any] = {"forward": [], "backward": []}
    if path.is_file():
        table = json.loads(path.read_text())
    table["about"] = {"device": name, "torch": torch.__version__, "date": time.strftime("%F")}
    directions = ("forward", "backward")
    known = {(r.get("m"), r.get("n"), r.get("k"), d) for d in directions for r in table[d]}
    plan = [(m, n, k, d) for m in tokens for d in directions for n, k in shapes]
    plan.sort(key=lambda row: row in known)
    started, done = time.monotonic(), 0
    with ExitStack() as stack:
        stack.enter_context(current(where))
        warm = _compilers(stack) if where.type == "cuda" else None
        for m, n, k, direction in plan:
            if time.monotonic() - started > 60 * minutes:
                break
            configs = [
                c for c in tried(direction, m)
                if from_hopper(capability) or _way(c)[1:] == ("pointers", False)
            ]  # fmt: skip
            configs = _distinct(configs, direction, n, k)
            configs = likely(
                configs, direction, m, n, k, costs.device_of(*device_traits(where)[:2])
            )
            present = choose(direction, m, n, k, *device_traits(where))
            if warm is not None:
                among = dict.fromkeys((*configs, present))
                warm([(m, n, k, direction, c, str(where), d) for d in dtypes for c in among])
            problems = [Problem(m, n, k, device=where, dtype=dtype) for dtype in dtypes]
            found = _fastest(problems, direction, clock, configs, present)
            row = {"m": m, "n": n, "k": k, **found}
            others = [
                r for r in table[direction] if (r.get("m"), r.get("n"), r.get("k")) != (m, n, k)
            ]
            table[direction] = [row, *others]
            write_json(path, table)
            done += 1
            if on_row:
                on_row(done, len(plan), {"direction": direction, **row})
    forget_tables()
    return path, done


def _distinct(configs: Iterable[Config], direction: str, n: int, k: int) -> list[Config]:
    """As `choose` will hand them out for this weight, each once: what is timed is what runs."""
    distinct: dict[Config, Config] = {}
    for config in (bounded(c, direction, n, k) for c in configs):
        whole = config.route == "split" and config.split == 1
        distinct.setdefault(replace(config, route="fused") if whole else config, config)
    return list(distinct.values())


def _compilers(stack: ExitStack) -> Callable[[list[Any]], None]:
    """Processes that run configurations once, side by side, so that Triton's disk cache has them.

    One after the other, compiling would take most of the time there is.
    """
    workers = max(1, min(16, (os.cpu_count() or 2) - 1))
    pool = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn")))

    def warm(tasks: list[Any]) -> None:
        # What goes wrong here goes wrong again where it is measured, and is told there.
        with suppress(BrokenProcessPool):
            list(pool.map(_run_once, tasks))

    return warm


def _run_once(task: tuple[int, int, int, str, Config, str, torch.dtype]) -> None:
    *shape, direction, config, device, dtype = task
    with current(torch.device(device)), suppress(RuntimeError, *triton_errors(*TOO_LARGE)):
        problem = _alone(*shape, device, dtype)
        (problem.forward if direction == "forward" else problem.backward)(config)
        torch.cuda.synchronize()


@lru_cache(maxsize=1)
def _alone(m: int, n: int, k: int, device: str, dtype: torch.dtype) -> Problem:
    """The problem that a worker has before it: its configurations come one after the other."""
    return Problem(m, n, k, copies=1, device=device, dtype=dtype)


def _fastest(
    problems: Sequence[Problem],
    direction: str,
    clock: Clock,
    configs: Sequence[Config],
    present: Config,
) -> dict[str, Any]:
    """The fastest configuration as a table has it, beside the time of the `present` choice."""
    best: tuple[float, Config] | None = None
    before: float | None = None
    for config in (*(c for c in configs if c != present), present):
        times = [_time(problem, direction, clock, config) for problem in problems]
        if any(t is None for t in times):
            continue
        microseconds = statistics.geometric_mean(t for t in times if t is not None)
        if config == present:
            before = microseconds
        if best is None or microseconds < best[0]:
            best = (microseconds, config)
    if best is None:
        m = problems[0].m
        raise SAMLError(f"{direction} of {m} tokens: no configuration runs on this device")
    return {**asdict(best[1]), "microseconds": best[0], "before_microseconds": before}


def _time(problem: Problem, direction: str, clock: Clock, config: Config) -> float | None:
    """Microseconds of a configuration; None where it is too large for the device."""
    run = problem.forward if direction == "forward" else problem.backward
    try:
        found = run(config)
    except triton_errors(*TOO_LARGE):
        return None
    except RuntimeError as error:
        if "resource" in str(error).lower() or "out of memory" in str(error).lower():
            return None  # more shared memory or registers than this device has
        raise
    off = problem.off(found, direction)
    if not off < TOLERANCE[problem.x.dtype]:
        raise SAMLError(f"{direction} of {problem.m} tokens: {config} is off by {off:.1e}")
    return clock(partial(run, config), ROUNDS, device=problem.x.device)["median_us"]
