"""Many speakers in a batch on a CPU beside one.

    python -m bench cpu-speakers --json bench/results/cpu-speakers.json

A decoding step: one row of x for each speaker, each with experts and a token router of its own,
beside the same rows with one speaker's, which the layer holds in float32. Experts as by default,
four of rank 4: in int8, as profiles store them, and in float32. All contenders of a shape take
their samples in turn; a ratio is the median over the rounds. "Warm" calls one layer again and
again; "cold" overwrites the caches before each train of a few layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.report.environment import device_name
from saml_kernels import SAMLConfig, quantize, saml_linear_routed
from saml_kernels.backends.cpu import backend as cpu
from saml_kernels.backends.cpu import native
from saml_kernels.files import write_json
from saml_kernels.quantization.tensor import QuantizedTensor
from saml_kernels.timing import Train, interleaved, sample
from saml_models.cli.output import progress
from saml_models.compress.packing import EXPERT_BLOCK

SHAPES = ((384, 384), (384, 1536), (1536, 384), (512, 512), (512, 2048), (2048, 512))
CPU = torch.device("cpu")
LAYERS = 4  # of a cold train
WARM_US = 3e3  # that a warm train lasts, roughly
PER_US = 2e5  # multiplications in a microsecond, roughly
RATIOS = ("one, int8", "float32", "int8")


def stored(experts: Tensor) -> QuantizedTensor:
    """As a profile holds them."""
    return quantize(experts, "int8", EXPERT_BLOCK, double_quant=False)


def trains(k: int, n: int, speakers: int, warm: bool) -> dict[str, Train]:
    """Calls of each contender: of one layer, or of a few that are each called once."""
    config, x = SAMLConfig(), torch.randn(speakers, 1, k)
    own = torch.arange(speakers, dtype=torch.int32).unsqueeze(1)
    first = torch.zeros_like(own)
    found: dict[str, list[Callable[[], Any]]] = {name: [] for name in ("one", *RATIOS)}
    for _ in range(1 if warm else LAYERS):
        a = torch.randn(speakers, config.num_experts, config.rank, k) / k**0.5
        b = torch.randn(speakers, config.num_experts, n, config.rank)
        v = torch.randn(speakers, config.num_experts, k) / k**0.5
        bias, base = torch.randn(n), torch.randn(n, k) / k**0.5
        laid = b.transpose(1, 2).contiguous().transpose(1, 2)  # as a model holds many
        layers: dict[str, tuple[Any, Any, Tensor, Tensor | None]] = {
            "one": (a[0].clone(), b[0].clone(), v[0].clone(), None),
            "one, int8": (stored(a[:1]), stored(b[:1]), v[:1].clone(), first),
            "float32": (a, laid, v, own),
            "int8": (stored(a), stored(b), v, own),
        }
        for name, (lora_a, lora_b, router, index) in layers.items():
            found[name].append(
                partial(
                    saml_linear_routed, x, quantize(base), lora_a, lora_b, router, bias,
                    config.scaling, speakers=index,
                )
            )  # fmt: skip
    calls = max(4, min(100, round(WARM_US / (speakers * k * n / PER_US)))) if warm else 1
    return {name: train * calls for name, train in found.items()}


def sample_warm(train: Train, device: torch.device) -> float:
    """Microseconds a call, caches as the call before left them."""
    train[0]()
    started = time.perf_counter()
    for call in train:
        call()
    return (time.perf_counter() - started) * 1e6 / len(train)


def main(
    threads: Annotated[int, typer.Option()] = 2,
    rounds: Annotated[int, typer.Option()] = 9,
    level: Annotated[str | None, typer.Option(help="Instruction set, if not the best.")] = None,
    speakers: Annotated[str, typer.Option(help="Numbers of speakers, by commas.")] = "16,64",
    json: Annotated[Path | None, typer.Option(help="Where the numbers go.")] = None,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if level:
        native.select(level)
    counts = [int(s) for s in speakers.split(",")]
    cases = [(k, n, s, warm) for s in counts for warm in (True, False) for k, n in SHAPES]
    about = f"{device_name(CPU)}; {cpu.native_status()}; torch {torch.__version__}"
    table = Table(title=f"Many speakers on a CPU, ratios of {rounds} rounds", caption=about)
    for head in ("speakers", "caches", "shape", "one speaker us", *RATIOS, "int8 / one, int8"):
        table.add_column(head, justify="right")
    rows = []
    with torch.no_grad(), progress("timing") as show:
        for done, (k, n, count, warm) in enumerate(cases):
            show(done, len(cases), f"{count} x {k} -> {n}")
            sampler = sample_warm if warm else sample
            taken = interleaved(trains(k, n, count, warm), CPU, rounds, sampler=sampler)
            row = {
                "in": k, "out": n, "speakers": count, "warm": warm,
                "one_us": round(taken["one"].median, 1),
                **{name: round(taken[name].ratio(taken["one"]), 3) for name in RATIOS},
                "int8_over_one": round(taken["int8"].ratio(taken["one, int8"]), 3),
            }  # fmt: skip
            rows.append(row)
            table.add_row(
                str(count), "warm" if warm else "cold", f"{k} -> {n}", str(row["one_us"]),
                *(str(row[name]) for name in (*RATIOS, "int8_over_one")),
            )  # fmt: skip
    Console().print(table)
    if json:
        write_json(json, {"about": about, "rounds": rounds, "rows": rows})
