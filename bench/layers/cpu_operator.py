"""The operator on a CPU beside float32 and bitsandbytes.

    python -m bench cpu-operator --json bench/results/cpu-operator.json

At Whisper's widths. All contenders of a shape take their samples in turn; a ratio is the median
over the rounds. Two states of the caches: "warm" calls one layer again and again, which lets
float32 keep its weight in the caches where it fits; "cold" overwrites the caches before each train
of a few layers, which is nearer to a model. NF4 with double quantisation; four experts of rank 8,
with given gates and with a token router's; bitsandbytes and float32 have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.layers.cases import Case
from bench.layers.contenders import Build, Operands, saml_layer
from bench.layers.registry import contenders
from saml_kernels.backends.cpu import backend as cpu
from saml_kernels.backends.cpu import native
from saml_kernels.files import write_json
from saml_kernels.timing import Train, interleaved
from saml_models.cli.output import progress

SHAPES = ((512, 512), (512, 2048), (768, 3072), (1280, 5120))  # in-features, out-features
CPU = torch.device("cpu")
WARM_MS = 3.0  # that a warm train lasts, roughly


def builders() -> dict[str, Build]:
    names = {
        "float32": "dense", "bitsandbytes": "bitsandbytes", "base": "saml base",
        "experts": "saml + experts",
    }  # fmt: skip
    known = contenders()
    found = {
        short: known[name].build for short, name in names.items() if not known[name].why_not(CPU)
    }
    return found | {"layer": saml_layer}


def trains(case: Case, warm: bool) -> dict[str, Train]:
    """One layer over and over, or a few that are each called once after the caches' overwriting."""
    layers = 1 if warm else 4
    x, gates = torch.randn(case.m, case.k), torch.rand(case.m, case.experts)
    found: dict[str, Train] = {}
    for name, build in builders().items():
        made = [build(Operands.random(case, CPU, torch.float32, seed)) for seed in range(layers)]
        calls = [lambda layer=layer: layer.call(x, gates) for layer in made]
        if warm:
            calls *= max(4, min(200, int(1.0e8 / (case.m * case.n * case.k) * WARM_MS)))
        found[name] = calls
    return found


def main(
    threads: Annotated[int, typer.Option()] = 2,
    rounds: Annotated[int, typer.Option()] = 9,
    level: Annotated[str | None, typer.Option(help="Instruction set, if not the best.")] = None,
    tokens: Annotated[str, typer.Option(help="Rows, by commas.")] = "1,5,8,1500",
    json: Annotated[Path | None, typer.Option(help="Where the numbers go.")] = None,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if level:
        level = native.select(level)
    cases = [Case("", "eager", int(m), n, k, 4, 8) for k, n in SHAPES for m in tokens.split(",")]
    about = f"{cpu.native_status()}; {threads} threads, torch {torch.__version__}"
    table = Table(title=f"NF4 operator on a CPU, ratios of {rounds} rounds", caption=about)
    heads = ("shape", "rows", "caches", "float32 us", "base", "experts", "layer",
             "experts / bitsandbytes")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right")
    rows = []
    with torch.no_grad(), progress("timing") as show:
        for done, case in enumerate(cases):
            show(done, len(cases), f"{case.m} x {case.k} -> {case.n}")
            for warm in (True, False) if case.m < 100 else (True,):
                taken = interleaved(trains(case, warm), CPU, rounds)
                bar, peer = taken["float32"], taken.get("bitsandbytes")
                ratios = {n: round(taken[n].ratio(bar), 3) for n in ("base", "experts", "layer")}
                row = {
                    "in": case.k, "out": case.n, "rows": case.m, "warm": warm,
                    "float32_us": round(bar.median, 1), **ratios,
                    "bitsandbytes": round(peer.ratio(bar), 3) if peer else None,
                    "experts_over_bitsandbytes": (
                        round(taken["experts"].ratio(peer), 3) if peer else None
                    ),
                }  # fmt: skip
                rows.append(row)
                shown = (
                    f"{case.k} -> {case.n}", case.m, "warm" if warm else "cold",
                    row["float32_us"], *ratios.values(), row["experts_over_bitsandbytes"],
                )  # fmt: skip
                table.add_row(*map(str, shown))
    Console().print(table)
    if json:
        write_json(json, {"about": about, "rounds": rounds, "rows": rows})
