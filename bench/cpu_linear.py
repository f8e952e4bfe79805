"""Times the CPU backend against float32 `F.linear` and bitsandbytes, at Whisper's widths.

    python bench/cpu_linear.py [--threads 2] [--rounds 9] [--level AVX2]

All contenders of one shape run in turn within each round (A B C A B C ...), so that a busy machine
disturbs them alike; the table shows the median over the rounds. Weights are NF4 with double
quantisation; "experts" adds four LoRA experts of rank 8 to the same call.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saml_kernels import cpu
from saml_kernels.cpu import native
from saml_kernels.quant import quantize

SHAPES = ((384, 384), (384, 1536), (512, 2048), (1280, 5120))  # in-features, out-features
TOKENS = (1, 5, 16, 300, 1500)
EXPERTS, RANK = 4, 8
SLICE = 0.003  # seconds that one contender runs in one round, at least once

Contenders = dict[str, Callable[[], Tensor]]


def bitsandbytes_linear(dense: Tensor, bias: Tensor) -> torch.nn.Module | None:
    """A bitsandbytes NF4 layer with these weights, or None where it is not installed."""
    logging.disable(logging.WARNING)  # it warns of an optional kernel package at import
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    finally:
        logging.disable(logging.NOTSET)
    out_features, in_features = dense.shape
    layer = bnb.nn.Linear4bit(
        in_features, out_features, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(dense.clone(), requires_grad=False, quant_type="nf4")
    layer.bias = torch.nn.Parameter(bias.clone())
    return layer.to("cpu").train()  # in eval mode it would repack the weight for bfloat16


def contenders(in_features: int, out_features: int) -> Callable[[int], Contenders]:
    """What runs for one weight, as a function of the number of tokens."""
    dense, bias = torch.randn(out_features, in_features), torch.randn(out_features)
    weight, peer = quantize(dense), bitsandbytes_linear(dense, bias)
    lora_a = torch.randn(EXPERTS, RANK, in_features)
    lora_b = torch.randn(EXPERTS, out_features, RANK)

    def for_tokens(m: int) -> Contenders:
        x, gates = torch.randn(m, in_features), torch.rand(m, EXPERTS)
        none = lora_a[:0], lora_b[:0], gates[:, :0]
        runs: Contenders = {"float32": lambda: F.linear(x, dense, bias)}
        if peer is not None:
            runs["bitsandbytes"] = lambda: peer(x)
        runs["saml"] = lambda: cpu.forward(x, weight, *none, bias, 1.0)
        runs["saml + experts"] = lambda: cpu.forward(x, weight, lora_a, lora_b, gates, bias, 1.0)
        return runs

    return for_tokens


def medians(runs: Contenders, rounds: int) -> dict[str, float]:
    """Seconds a call, the median over interleaved rounds."""
    repeats = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(SLICE / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def rows(rounds: int) -> Iterator[list[str]]:
    """Lines of the table: shape, microseconds of each contender, ratios."""
    for in_features, out_features in SHAPES:
        for_tokens = contenders(in_features, out_features)
        for m in TOKENS:
            taken = medians(for_tokens(m), rounds)
            ours, peer = taken["saml"], taken.get("bitsandbytes")
            yield [
                f"{in_features} -> {out_features}",
                str(m),
                *(
                    f"{taken[name] * 1e6:,.0f}" if name in taken else "not installed"
                    for name in ("float32", "bitsandbytes", "saml", "saml + experts")
                ),
                f"{ours / taken['float32']:.2f}",
                f"{ours / peer:.2f}" if peer else "-",
            ]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--level", choices=native.LEVELS, help="instruction set, if not the best")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.level:
        options.level = native.select(options.level)
    table = Table(
        title=f"NF4 linear, microseconds (median of {options.rounds}), {options.threads} threads",
        caption=f"{options.level or cpu.native_status()}; torch {torch.__version__}",
    )
    for head in ("shape", "tokens", "float32", "bitsandbytes", "saml", "saml + experts"):
        table.add_column(head, justify="right")
    table.add_column("saml / float32", justify="right")
    table.add_column("saml / bnb", justify="right")
    with torch.no_grad():
        for row in rows(options.rounds):
            table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
