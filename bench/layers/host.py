"""What a call costs before the device starts, and what it launches.

    python -m bench host --json FILE

Python, allocations and casts count. No GPU: launches are replaced by nothing, and tensors are real
but so small (x [4, 64], N = K = 64, 4 experts of rank 4) that arithmetic costs nothing. The bar is
`torch.nn.functional.linear` and its backward on tensors of the same sizes (`torch.nn.Linear` for a
whole layer), timed in turn with each case. Below it, the operations that a GPU would be given,
kernels and PyTorch's own, for any number of rows.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saml_kernels import SAMLConfig, SAMLLinear, quantize, saml_linear, saml_linear_routed
from saml_kernels.backends import registry
from saml_kernels.backends.triton import launcher as dispatch
from saml_kernels.backends.triton.backend import facts_of
from saml_kernels.backends.triton.configs import pretending
from saml_kernels.backends.triton.facts import weight_parts
from saml_kernels.backends.triton.plan import backward_plan, forward_plan
from saml_kernels.backends.triton.prebuilt import Driver, started
from saml_kernels.backends.triton.signature import Launch, signature
from saml_kernels.files import write_json
from saml_kernels.quantization.tensor import QuantizedTensor
from saml_kernels.timing import Timing

ROWS, WIDTH, EXPERTS, RANK, SPEAKERS = 4, 64, 4, 4, 3
ON = {True: "on", False: "off"}
TOKENS = (1, 16, 64, 256, 1024, 4096)
# Of PyTorch's operators, those that give the device nothing to do.
FREE: tuple[str, ...] = (
    "empty",
    "view",
    "reshape",
    "expand",
    "slice",
    "select",
    "transpose",
    "detach",
    "alias",
)
FREE += ("as_strided", "permute", "squeeze", "t", "new_empty", "_unsafe_view")


@dataclass(frozen=True)
class Layer:
    """Tensors of a call, and the call."""

    x: Tensor
    leaves: tuple[Tensor, ...]
    run: Callable[[], Tensor]
    prepared: Callable[[], Any]


def layer(
    gating: str, speakers: bool, rows: int = ROWS, dtype: torch.dtype = torch.float32
) -> Layer:
    """One layer; `gating` is "router" (a token router), "gates" (given ones) or "layer".

    The last is a `SAMLLinear`, with a token router of its own.
    """
    if gating == "layer":
        config = SAMLConfig(num_experts=EXPERTS, rank=RANK)
        whole = SAMLLinear.from_linear(torch.nn.Linear(WIDTH, WIDTH), config)
        x = torch.randn(1, rows, WIDTH, dtype=dtype).requires_grad_()
        leaves = (x, *(p for p in whole.parameters() if p.requires_grad))
        return Layer(x, leaves, partial(whole, x), lambda: None)
    lead = (SPEAKERS,) if speakers else ()
    weight = quantize(torch.randn(WIDTH, WIDTH))

    def parameter(*shape: int) -> Tensor:
        return torch.randn(*shape).requires_grad_()

    a, b = parameter(*lead, EXPERTS, RANK, WIDTH), parameter(*lead, EXPERTS, WIDTH, RANK)
    x = torch.randn(1, rows, WIDTH, dtype=dtype).requires_grad_()
    index = torch.zeros(1, 1, dtype=torch.int32) if speakers else None
    bias = torch.randn(WIDTH)
    if gating == "router":
        gates = parameter(*lead, EXPERTS, WIDTH)
        call = partial(
            saml_linear_routed, x, weight, a, b, gates, bias, 0.5, backend="triton", speakers=index
        )
    else:
        gates = torch.softmax(torch.randn(1, rows, EXPERTS), -1).requires_grad_()
        call = partial(saml_linear, x, weight, a, b, gates, bias, 0.5, "triton", index)
    again = lambda: weight.prepared(x, a, b, gates, bias, index)  # noqa: E731
    return Layer(x, (x, a, b, gates), call, again)


def nothing_of_triton(launch: Launch) -> Callable[..., None]:
    """A launch as Triton's compiled kernel gets it, up to that kernel."""
    made = SimpleNamespace(
        run=lambda *arguments: None, function=None, packed_metadata=None, metadata=None
    )
    return dispatch.started(made, launch, 0, lambda device: 0)


def nothing_of_the_driver(launch: Launch) -> Callable[..., None]:
    """A launch of a prebuilt kernel, up to the driver."""
    library = SimpleNamespace(cuLaunchKernel=lambda *arguments: 0)
    driver = Driver(library, lambda device: 0)
    kinds = [kind for kind in signature(launch)[0] if kind != "constexpr"]
    sizes = [8 if kind.startswith("*") or kind == "i64" else 4 for kind in kinds]
    return started(driver, ctypes.c_void_p(1), launch, 0, 128, 0, [*sizes, 8, 8])


PATHS = {"triton": nothing_of_triton, "prebuilt": nothing_of_the_driver}


def both(run: Callable[[], Tensor], dy: Tensor) -> None:
    """Forward and backward; gradients are dropped, as an optimiser with set_to_none does."""
    y = run()
    y.backward(dy if dy.dtype == y.dtype else dy.to(y.dtype))


def samples(
    calls: dict[str, Callable[[], Any]], rounds: int, repeat: int = 200
) -> dict[str, Timing]:
    """Microseconds of each call, in turn."""

    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-2, rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(repeat):
                call()
            if turn >= 0:
                found[name].append((time.perf_counter() - started) * 1e6 / repeat)
    return {name: Timing(tuple(values)) for name, values in found.items()}


def host(rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each case: medians, and the ratio to the bar."""
    x, dense = torch.randn(1, ROWS, WIDTH).requires_grad_(), torch.nn.Linear(WIDTH, WIDTH)
    dy = torch.randn(1, ROWS, WIDTH)
    for path, bind in PATHS.items():
        for gating in ("layer", "router", "gates"):
            linear = partial(dense, x)
            if gating != "layer":
                linear = partial(F.linear, x, dense.weight, dense.bias)
            for many in (False,) if gating == "layer" else (False, True):
                for autocast in (False, True):
                    with (
                        dispatch.starting_with(bind),
                        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
                    ):
                        case = layer(gating, many)
                        found = samples(
                            {
                                "bar": linear, "ours": case.run,
                                "bar+": partial(both, linear, dy),
                                "ours+": partial(both, case.run, dy),
                            },
                            rounds,
                        )  # fmt: skip
                    yield {
                        "path": path, "gating": gating, "speakers": SPEAKERS if many else 1,
                        "autocast": autocast,
                        "forward_us": round(found["ours"].median, 1),
                        "forward_ratio": round(found["ours"].ratio(found["bar"]), 2),
                        "both_us": round(found["ours+"].median, 1),
                        "both_ratio": round(found["ours+"].ratio(found["bar+"]), 2),
                    }  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts PyTorch's operators that a device would have to run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if not name.startswith(FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[list[str]]:
    """Within the block, names of all operations that a GPU would be given."""
    names: list[str] = []
    with dispatch.recording() as launched, Counting() as mode:
        yield names
    names += [launch.name for launch in launched] + mode.names


def operations(gating: str, many: bool, autocast: bool, rows: int) -> tuple[list[str], list[str]]:
    """Names of what one call launches, forward and backward."""
    with (
        dispatch.starting_with(nothing_of_triton),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        case = layer(gating, many, rows)
        dy = torch.randn_like(case.run())  # which prepares
        with counting() as forward:
            y = case.prepared()
        with counting() as backward:
            torch.autograd.grad(y, case.leaves, dy)
    return forward, backward


def launches(m: int, n: int, k: int, capability: str, processors: int) -> list[list[str]]:
    """What such a GPU is given for a routed call of one speaker in float16.

    Names of a forward, of one that keeps P for a backward, and of that backward: kernels in their
    order, then operators of PyTorch.
    """

    def tensor(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float16, device="meta")

    x, dy, bias, router = tensor(m, k), tensor(m, n), tensor(n), tensor(EXPERTS, k)
    weight = QuantizedTensor.empty((n, k), device="meta")
    a, b = tensor(EXPERTS, RANK, k), tensor(EXPERTS, n, RANK)
    given, routing = (weight, a, b, router), (None, 1.0)
    forward = (x, weight_parts(weight), a, None, b, None, router, bias, None, 1.0)
    plain = made = None
    found = []
    with pretending(capability, processors):
        facts = facts_of(x, *given, bias, None, routing)
        for keep in (False, True):
            with counting():  # a first call makes tables and counters
                forward_plan(facts, keep)(*forward)
            with counting() as names:
                _, plain, made = forward_plan(facts, keep)(*forward)
            found.append(names)
        facts = facts_of(x, *given, None, None, routing, dy=dy)
        plan = backward_plan(facts, (True,) * 4, True)
        with counting() as names:
            plan(dy, x, weight_parts(weight), a, b, router, None, 1.0, plain, made)
    return [*found, names]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 9,
    json: Annotated[Path | None, typer.Option(help="Where the numbers go.")] = None,
) -> None:
    torch.set_num_threads(1)
    registry.PREFERRED["cpu"] = "triton"  # these tensors stand for those of a GPU
    print(f"{'path':9} {'gating':7} {'speakers':>8} {'autocast':>8} "
          f"{'forward us':>10} {'of linear':>9} {'+ backward':>10} {'of linear':>9}")  # fmt: skip
    rows = []
    for row in host(rounds):
        rows.append(row)
        print(
            f"{row['path']:9} {row['gating']:7} {row['speakers']:8} {ON[row['autocast']]:>8} "
            f"{row['forward_us']:10} {row['forward_ratio']:9} {row['both_us']:10} "
            f"{row['both_ratio']:9}", flush=True,
        )  # fmt: skip
    print(
        f"\n{'rows':>5} {'gating':7} {'speakers':>8} {'autocast':>8}  operations forward, backward"
    )
    counts = []
    for tokens in TOKENS:
        for gating in ("router", "gates"):
            for many in (False, True):
                for autocast in (False, True):
                    forward, backward = operations(gating, many, autocast, tokens)
                    counts.append({
                        "rows": tokens, "gating": gating, "speakers": SPEAKERS if many else 1,
                        "autocast": autocast, "forward": forward, "backward": backward,
                    })  # fmt: skip
                    print(f"{tokens:5} {gating:7} {SPEAKERS if many else 1:8} "
                          f"{ON[autocast]:>8}  {len(forward)} {len(backward)}  "
                          f"{' '.join(forward)} | {' '.join(backward)}")  # fmt: skip
    if json:
        write_json(json, {"torch": torch.__version__, "host": rows, "operations": counts})
        print(json)
