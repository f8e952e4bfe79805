"""Ahead-of-time builds: every kernel that a model needs, for a GPU that is not here.

    python -m saml_kernels.aot --arch sm_87 --model base OUT/

writes one cubin for each kernel and `kernels.json`, and prints registers, spilled bytes, shared
memory and size of each. The exit status is 1 if a kernel spills. On the other machine, which needs
no Triton, SAML_KERNELS=OUT (or `load_kernels(OUT)`) uses them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.quant import QuantizedTensor, quantize
from saml_kernels.triton.configs import pretending
from saml_kernels.triton.dispatch import (
    ALIGNMENT,
    Launch,
    interpreting,
    kernel,
    key_of,
    load_kernels,
    recording,
    signature,
)
from saml_kernels.triton.prebuilt import MANIFEST

__all__ = ["ARCHITECTURES", "WIDTHS", "Built", "build", "load_kernels"]

# Multiprocessors of a typical card: they decide how far a small product is split.
ARCHITECTURES = {
    "sm_80": 108, "sm_86": 84, "sm_87": 16, "sm_89": 128,
    "sm_90": 132, "sm_100": 148, "sm_110": 20, "sm_120": 170,
}  # fmt: skip
WIDTHS = {"tiny": 384, "base": 512, "small": 768, "medium": 1024, "large": 1280}
# Both ends of each rule of the default tuning table: a product may be split at one of them only.
TOKENS = (1, 16, 17, 64, 65, 256, 257, 1024, 1500)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SCRATCH_TOKENS = 64  # the scratch route's kernels are the same for any number
EXPERT_FORMATS = ("float", "int8")
ROUTERS = ("token", "given")
SHARED_LIMIT = 99 * 1024  # what one table may use on sm_86, sm_87 and sm_89 alike


@dataclass(frozen=True)
class Built:
    """One compiled kernel.

    Attributes:
        key: tells it from the others; see `dispatch.key_of`.
        name: of the kernel; `file` holds its cubin, `entry` is the function in it.
        parameters: bytes of each argument, in order; constants: compile-time values.
        warps, stages: of a program.
        registers: per thread; spilled: bytes of local memory per thread; shared: bytes per program.
        size: of the cubin in bytes.
    """

    key: str
    name: str
    file: str
    entry: str
    parameters: list[int]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    size: int


def build(
    arch: str,
    model: str,
    out: Path,
    *,
    dtype: str = "float16",
    format: str = "nf4",
    experts: int = 4,
    rank: int = 4,
    expert_format: str = "float",
    router: str = "token",
    speakers: bool = False,
    train: bool = False,
) -> Iterator[Built]:
    """Compile the kernels of a Whisper's layers, one after the other; the manifest comes last.

    Args:
        arch: one of `ARCHITECTURES`.
        model: one of `WIDTHS`.
        out: folder for cubins and `kernels.json`.
        dtype: of the activations; format: of the weights.
        experts, rank: E and r.
        expert_format: "float" (the activations' type) or "int8", which cannot be trained.
        router: "token" (the kernels make the gates) or "given" (they are an argument).
        speakers: rows of many speakers in a call.
        train: the backward kernels too.

    Raises:
        SAMLError: an unknown name, no Triton, or kernels are being interpreted.
    """
    for what, value, known in (
        ("arch", arch, ARCHITECTURES), ("model", model, WIDTHS), ("dtype", dtype, DTYPES),
        ("router", router, ROUTERS), ("expert-format", expert_format, EXPERT_FORMATS),
    ):  # fmt: skip
        if value not in known:
            raise SAMLError(f"--{what} {value}: expected one of {', '.join(known)}")
    if interpreting():
        raise SAMLError("TRITON_INTERPRET is set: nothing is compiled; unset it")
    try:
        import triton
    except ImportError as error:
        raise SAMLError(
            "aot: triton is not installed; pip install 'saml-kernels[triton]'"
        ) from error
    out.mkdir(parents=True, exist_ok=True)
    done: dict[str, Built] = {}
    if train and expert_format == "int8":
        raise SAMLError("--train: int8 experts have no backward; leave one of the two out")
    shape = (WIDTHS[model], experts, rank)
    formats = (format, expert_format)
    for launch in _launches(
        arch, shape, DTYPES[dtype], formats, router == "token", speakers, train
    ):
        key = key_of(launch)
        if key not in done:
            done[key] = _compile(launch, key, arch, out)
            yield done[key]
    manifest = {
        "arch": arch, "model": model, "triton": triton.__version__,
        "kernels": [asdict(k) for k in done.values()],
    }  # fmt: skip
    temporary = out / f"{MANIFEST}.part"
    temporary.write_text(json.dumps(manifest, indent=1))
    temporary.replace(out / MANIFEST)


def _launches(
    arch: str, shape: tuple[int, int, int], dtype: torch.dtype, formats: tuple[str, str],
    routed: bool, many: bool, train: bool,
) -> Iterator[Any]:  # fmt: skip
    """What the backend would launch for each layer of (width, E, r) and number of tokens."""
    width, experts, rank = shape
    backend: Any = import_module("saml_kernels.triton")

    for k, n in ((width, width), (width, 4 * width), (4 * width, width)):
        weight: QuantizedTensor = quantize(torch.ones(n, k), formats[0])
        lead = (2,) if many else ()
        lora_a: Tensor | QuantizedTensor = torch.zeros(*lead, experts, rank, k, dtype=dtype)
        lora_b: Tensor | QuantizedTensor = torch.zeros(*lead, experts, n, rank, dtype=dtype)
        if formats[1] == "int8":
            lora_a, lora_b = (
                QuantizedTensor.empty(t.shape, "int8", 128, False) for t in (lora_a, lora_b)
            )
        bias = torch.zeros(n, dtype=dtype)
        for m, route in (*((m, _route(m)) for m in TOKENS), (SCRATCH_TOKENS, "scratch")):
            x = torch.zeros(m, k, dtype=dtype)
            gates = torch.zeros(*lead, experts, k) if routed else torch.zeros(m, experts)
            index = torch.zeros(m, dtype=torch.int32) if many else None
            common: tuple[Any, ...] = (weight, lora_a, lora_b, gates.to(dtype))
            how: dict[str, Any] = {"routing": (None, 1.0) if routed else None}
            how |= {"speakers": index, "route": route}
            for b in (bias, None):  # Whisper's k_proj has none
                with pretending(arch, ARCHITECTURES[arch]), recording() as found:
                    backend.forward(x, *common, b, 1.0, **how)
                yield from found
            if train:
                dy = torch.zeros(m, n, dtype=dtype)
                needs = (True, True, True, True)
                with pretending(arch, ARCHITECTURES[arch]), recording() as found:
                    backend.backward(dy, x, *common, 1.0, needs, **how)
                yield from found


def _route(tokens: int) -> str | None:
    # cuBLAS does not run on the CPU that stands in: its part is left to the real device.
    return "fused" if tokens > 1024 else None


def _compile(launch: Launch, key: str, arch: str, out: Path) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel(launch.name)
    types, aligned = signature(launch)
    named = dict(zip(function.arg_names, types, strict=False))
    named |= dict.fromkeys(launch.constants, "constexpr")
    constants = {(function.arg_names.index(n),): v for n, v in launch.constants.items()}
    attributes = {(position,): [["tt.divisibility", ALIGNMENT]] for position in aligned}
    source = ASTSource(function, named, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target, options)
    cubin = compiled.asm["cubin"]
    path = out / f"{launch.name}-{key}.cubin"
    path.write_bytes(cubin)
    registers, spilled = _resources(path)
    return Built(
        key, launch.name, path.name, compiled.metadata.name, _parameters(compiled.asm["ptx"]),
        {n: v for n, v in launch.constants.items() if n != "PTX"},
        launch.warps, launch.stages, registers, spilled, compiled.metadata.shared, len(cubin),
    )  # fmt: skip


def _parameters(ptx: str) -> list[int]:
    """Bytes of each parameter of the entry, in order."""
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    bits = re.findall(r"\.param \.\w(\d+) ", entry.group(1)) if entry else []
    return [int(b) // 8 for b in bits]


def _resources(cubin: Path) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, as cuobjdump of Triton's wheel reads them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    text = subprocess.run(
        [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 if no kernel spills or wants too much shared memory."""
    parser = argparse.ArgumentParser(prog="python -m saml_kernels.aot", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="sm_87", help=", ".join(ARCHITECTURES))
    parser.add_argument("--model", default="base", help=", ".join(WIDTHS))
    parser.add_argument("--dtype", default="float16", help=", ".join(DTYPES))
    parser.add_argument("--format", default="nf4", help="nf4, fp4, int8 or int4")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--expert-format", default="float", help=", ".join(EXPERT_FORMATS))
    parser.add_argument("--router", default="token", help=", ".join(ROUTERS))
    parser.add_argument("--speakers", action="store_true", help="many in one call")
    parser.add_argument("--train", action="store_true", help="the backward kernels too")
    o = parser.parse_args(arguments)
    print(f"{'kernel':8} {'tile':>14} {'warps':>5} {'registers':>9} {'spilled':>7} "
          f"{'shared':>7} {'cubin':>7}")  # fmt: skip
    bad = 0
    try:
        for k in build(
            o.arch, o.model, o.out, dtype=o.dtype, format=o.format, experts=o.experts,
            rank=o.rank, expert_format=o.expert_format, router=o.router, speakers=o.speakers,
            train=o.train,
        ):  # fmt: skip
            tile = "x".join(str(v) for n, v in k.constants.items() if n.startswith("BLOCK"))
            print(f"{k.name:8} {tile:>14} {k.warps:5} {k.registers:9} {k.spilled:7} "
                  f"{k.shared:7} {k.size:7}")  # fmt: skip
            bad += k.spilled > 0 or k.shared > SHARED_LIMIT
    except SAMLError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{o.out / MANIFEST}: {o.arch}, {'no spills' if not bad else f'{bad} too large'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
