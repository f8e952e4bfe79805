"""Ahead-of-time builds: every kernel that a model needs, for a GPU that is not here.

    python -m saml_kernels.aot --arch sm_87 --model base OUT/

writes one cubin for each kernel and `kernels.json`, and prints registers, spilled bytes, shared
memory and size of each. The exit status is 1 if a kernel spills. On the other machine, which needs
no Triton, SAML_KERNELS=OUT (or `load_kernels(OUT)`) uses them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import import_module
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saml_kernels.backends.reference import Gating
from saml_kernels.backends.triton.configs import Config, predicted, pretending
from saml_kernels.backends.triton.launcher import interpreting, kernel, load_kernels, recording
from saml_kernels.backends.triton.prebuilt import MANIFEST
from saml_kernels.backends.triton.signature import ALIGNMENT, Launch, key_of, signature
from saml_kernels.errors import SAMLError, needs
from saml_kernels.files import write_json
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["ARCHITECTURES", "WIDTHS", "Built", "build", "load_kernels"]

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120")
WIDTHS = {"tiny": 384, "base": 512, "small": 768, "medium": 1024, "large": 1280}
VOCABULARY = 51865  # Whisper's, of the output head; the others differ in nothing a kernel sees
# Noting down a call costs nothing, so every rule of a measured table is met by asking often.
TOKENS = (*range(1, 33), *(int(32 * 1.1**i) for i in range(1, 52)))
# The cost model's choice goes by tokens, rounded up to such a number, and by the device's size.
# What it chooses for any size is met on three, which give a projection each of its tiles and
# gradients one share or several.
SIZES = tuple(1 << i for i in range(14))
DEVICES = range(1, 257)  # processors
PROCESSORS = (8, 16, 1000)
# Whose gradients are wanted: of x (the first layer's has none), A, B and gates or router. A model's
# experts learn or are frozen, and so do its gates.
NEEDS = tuple((x, e, e, g) for x, e, g in product((True, False), repeat=3) if x or e or g)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
EXPERT_FORMATS = ("float", "float32", "int8")
ROUTERS = ("token", "given")
SHARED_LIMIT = 99 * 1024  # what one table may use on sm_86, sm_87 and sm_89 alike
SHARED_LIMITS = {"sm_90": 227 * 1024}  # of an architecture that has tiles of its own
REGISTERS = 255  # a thread's most


@dataclass(frozen=True)
class Built:
    """One compiled kernel.

    Attributes:
        key: tells it from the others; see `dispatch.key_of`.
        name: of the kernel; `file` holds its cubin, `entry` is the function in it.
        parameters: bytes of each argument, in order; constants: compile-time values.
        warps, stages: of a program.
        registers: per thread; spilled: bytes of local memory per thread; shared: bytes per program.
        memory: bytes per program that the kernel makes its tensor descriptors in.
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
    memory: int
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
    top_k: int | None = None,
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
        expert_format: of experts, router and bias: "float" (the activations' type), "float32" (as
            autocast leaves them), or "int8" experts, which cannot be trained.
        router: "token" (the kernels make the gates) or "given" (they are an argument).
        top_k: of the token router; None keeps all gates.
        speakers: rows of many speakers in a call.
        train: the backward kernels too.

    Raises:
        SAMLError: an unknown name, a number out of range, no Triton, or kernels are interpreted.
    """
    for what, value, known in (
        ("arch", arch, ARCHITECTURES), ("model", model, WIDTHS), ("dtype", dtype, DTYPES),
        ("router", router, ROUTERS), ("expert-format", expert_format, EXPERT_FORMATS),
    ):  # fmt: skip
        if value not in known:
            raise SAMLError(f"--{what} {value}: expected one of {', '.join(known)}")
    if experts < 1 or rank < 1:
        raise SAMLError(f"--experts {experts} --rank {rank}: expected positive numbers")
    if top_k is not None and not 1 <= top_k <= experts:
        raise SAMLError(f"--top-k {top_k}: expected 1..{experts}")
    if train and expert_format == "int8":
        raise SAMLError("--train: int8 experts have no backward; leave one of the two out")
    if interpreting():
        raise SAMLError("TRITON_INTERPRET is set: nothing is compiled; unset it")
    with needs("aot", "triton"):
        import triton
    out.mkdir(parents=True, exist_ok=True)
    done: dict[str, Built] = {}
    layers = _Layers(
        WIDTHS[model], DTYPES[dtype], format, experts, rank, expert_format,
        (top_k, 1.0) if router == "token" else None, speakers, train,
    )  # fmt: skip
    for launch in layers.launches(arch):
        key = key_of(launch)
        if key not in done:
            done[key] = _compile(launch, key, arch, out)
            yield done[key]
    manifest = {
        "arch": arch, "model": model, "triton": triton.__version__,
        "kernels": [asdict(k) for k in done.values()],
    }  # fmt: skip
    write_json(out / MANIFEST, manifest)


def _part(name: str) -> Any:
    """A module of the backend, imported once Triton is known to be there."""
    return import_module(f"saml_kernels.backends.triton.{name}")


class _Experts(NamedTuple):
    """The arguments of a call that are the experts' own; `spans` as in `backend.facts_of`."""

    a: Any
    b: Any
    gates: Tensor
    gating: Gating | None = None
    speakers: Tensor | None = None
    spans: tuple[int, int] = (1, 1)


@cache
def _choices(direction: str, m: int, n: int, k: int, arch: str) -> tuple[Config, ...]:
    """What the cost model chooses on some of `DEVICES`; one or two shares stand for any number."""
    found = (predicted(direction, m, n, k, arch, processors)[0] for processors in DEVICES)
    return tuple({replace(c, split=min(2, c.split)): None for c in found})


def _ways(n: int, k: int, arch: str) -> Iterator[tuple[int, Config | None, Config | None]]:
    """Numbers of tokens, and how forward and backward go; None: as the tables have it."""
    yield from ((m, None, None) for m in TOKENS)
    for m in SIZES:
        both = (_choices(direction, m, n, k, arch) for direction in ("forward", "backward"))
        for way, back in zip_longest(*both):
            yield m, way, back


@dataclass(frozen=True)
class _Layers:
    """The layers of one Whisper, as tensors without memory."""

    width: int
    dtype: torch.dtype
    format: str
    experts: int
    rank: int
    kind: str
    gating: Gating | None
    many: bool
    train: bool

    def launches(self, arch: str) -> Iterator[Launch]:
        """What the backend would launch on such devices, of any size, for any number of tokens."""
        for processors in PROCESSORS:
            with pretending(arch, processors):
                for call in self._calls(arch):
                    with recording() as found:
                        call()
                    yield from found

    def _calls(self, arch: str) -> Iterator[Callable[[], Any]]:
        d = self.width
        for k, n in ((d, d), (d, 4 * d), (4 * d, d), (d, VOCABULARY)):
            weight = QuantizedTensor.empty((n, k), self.format, device="meta")
            for m, way, back in _ways(n, k, arch):
                for experts in self._experts(m, n, k):
                    for bias in (self._parameter(n), None):  # Whisper's k_proj has none
                        yield partial(self._forward, m, weight, experts, bias, way)
                    if self.train:
                        yield partial(self._backward, m, weight, experts, back)
                    alone = experts.speakers is None and experts.gating is not None
                    if n == k and alone and self.kind != "int8":
                        yield partial(self._together, m, weight, experts, way)

    def _forward(
        self,
        m: int,
        weight: QuantizedTensor,
        experts: _Experts,
        bias: Tensor | None,
        route: Config | None,
    ) -> None:
        """As it runs without gradients; to train, as it runs with them too."""
        backend, plan, weight_parts = _part("backend"), _part("plan"), _part("facts").weight_parts
        a, b, gates, gating, speakers, spans = experts
        x = self._tensor(m, weight.shape[1])
        facts = backend.facts_of(
            x, weight, a, b, gates, bias, speakers, gating, spans=spans, route=route
        )
        parts = (*backend.expert_parts(a), *backend.expert_parts(b))
        for keep in (False, True) if self.train else (False,):
            plan.forward_plan(facts, keep)(
                x, weight_parts(weight), *parts, gates, bias, speakers, 1.0
            )

    def _backward(
        self, m: int, weight: QuantizedTensor, experts: _Experts, route: Config | None
    ) -> None:
        """For each of `NEEDS`, with what the forward kept and without."""
        backend, plan, weight_parts = _part("backend"), _part("plan"), _part("facts").weight_parts
        a, b, gates, gating, speakers, spans = experts
        x, dy = self._tensor(m, weight.shape[1]), self._tensor(m, weight.shape[0])
        facts = backend.facts_of(
            x, weight, a, b, gates, None, speakers, gating, spans=spans, dy=dy, route=route
        )
        plain = made = None
        if facts.columns:
            plain = self._float32(m, facts.columns)
            made = None if gating is None else self._float32(m, facts.experts)
        given = (dy, x, weight_parts(weight), a, b, gates, speakers, 1.0)
        # Where x was cast, its gradient comes back in float32.
        dtypes = (None, torch.float32) if self.kind == "float32" else (None,)
        for wanted in NEEDS if facts.columns else NEEDS[:1]:
            plan.backward_plan(facts, wanted, False)(*given)
            for dtype in dtypes:
                plan.backward_plan(facts, wanted, plain is not None)(*given, plain, made, dtype)

    def _together(
        self, m: int, weight: QuantizedTensor, experts: _Experts, route: Config | None
    ) -> None:
        """An attention's q, k and v, which read the same few tokens; k and v of what is heard."""
        backend, single = _part("backend"), _part("single")
        weight_parts = _part("facts").weight_parts
        (a, b, router, gating, *_), (n, k) = experts, weight.shape
        x = self._tensor(m, k)
        bias = self._parameter(n)
        facts = backend.facts_of(x, weight, a, b, router, bias, None, gating, route=route)
        if facts.config("forward").route == "single":
            codes, scales, table = weight_parts(weight)
            member = (codes, scales, a, router, b, bias)
            for count in (2, 3):
                single.together_plan(facts, count).together(x, table, [member] * count, 1.0)

    def _experts(self, m: int, n: int, k: int) -> Iterator[_Experts]:
        """Those of a layer; then a base without any.

        The latter is the output head, and every layer while dropout is on.
        """
        if n != VOCABULARY:
            lead = (2,) if self.many else ()
            a: Any = self._parameter(*lead, self.experts, self.rank, k)
            b: Any = self._parameter(*lead, self.experts, n, self.rank)
            if self.kind == "int8":
                a, b = (
                    QuantizedTensor.empty(t.shape, "int8", 128, False, device="meta")
                    for t in (a, b)
                )
            gates = self._tensor(m, self.experts)
            if self.gating is not None:
                gates = self._parameter(*lead, self.experts, k)
            index = torch.empty(m, dtype=torch.int32, device="meta") if self.many else None
            # The rows of a clip may share gates and speaker.
            of_gates = {1, m} if self.gating is None else {1}
            for spans in product(of_gates, {1, m} if self.many else {1}):
                yield _Experts(a, b, gates, self.gating, index, spans)
        if n == VOCABULARY or self.train:
            yield _Experts(self._tensor(0, 1, k), self._tensor(0, n, 1), self._tensor(0))

    def _tensor(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="meta")

    def _float32(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device="meta")

    def _parameter(self, *shape: int) -> Tensor:
        dtype = torch.float32 if self.kind == "float32" else self.dtype
        return torch.empty(*shape, dtype=dtype, device="meta")


def _compile(launch: Launch, key: str, arch: str, out: Path) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel(launch.name)
    types, aligned = signature(launch)
    named = dict(zip(function.arg_names, types, strict=False))
    named |= dict.fromkeys(launch.constants, "constexpr")
    constants = {(function.arg_names.index(n),): v for n, v in launch.constants.items()}
    absent = {i for i, value in enumerate(launch.arguments) if value is None}
    constants |= {
        (i,): None if i in absent else 1 for i, kind in enumerate(types) if kind == "constexpr"
    }
    attributes = {(position,): [["tt.divisibility", ALIGNMENT]] for position in aligned}
    source = ASTSource(function, named, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    path = out / f"{launch.name}-{key}.cubin"
    # Left alone, ptxas may spill a few bytes to fit more programs on a processor: then not so.
    for limit in ({}, {"maxnreg": REGISTERS}):
        compiled = triton.compile(source, target, options | limit)
        cubin = compiled.asm["cubin"]
        path.write_bytes(cubin)
        registers, spilled = _resources(path)
        if not spilled:
            break
    return Built(
        key, launch.name, path.name, compiled.metadata.name, _parameters(compiled.asm["ptx"]),
        {n: v for n, v in launch.constants.items() if n != "PTX"},
        launch.warps, launch.stages, registers, spilled, compiled.metadata.shared,
        compiled.metadata.global_scratch_size, len(cubin),
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
    used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


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
    parser.add_argument("--top-k", type=int, help="of the token router; default: all gates")
    parser.add_argument("--speakers", action="store_true", help="many in one call")
    parser.add_argument("--train", action="store_true", help="the backward kernels too")
    o = parser.parse_args(arguments)
    print(f"{'kernel':8} {'tile':>14} {'warps':>5} {'registers':>9} {'spilled':>7} "
          f"{'shared':>7} {'cubin':>7}")  # fmt: skip
    bad = 0
    try:
        for k in build(
            o.arch, o.model, o.out, dtype=o.dtype, format=o.format, experts=o.experts,
            rank=o.rank, expert_format=o.expert_format, router=o.router, top_k=o.top_k,
            speakers=o.speakers, train=o.train,
        ):  # fmt: skip
            tile = "x".join(str(v) for n, v in k.constants.items() if n.startswith("BLOCK"))
            print(f"{k.name:8} {tile:>14} {k.warps:5} {k.registers:9} {k.spilled:7} "
                  f"{k.shared:7} {k.size:7}")  # fmt: skip
            limit = SHARED_LIMITS.get(o.arch, SHARED_LIMIT)
            bad += k.spilled > 0 or k.shared > limit
    except SAMLError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{o.out / MANIFEST}: {o.arch}, {'no spills' if not bad else f'{bad} too large'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
