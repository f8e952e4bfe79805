"""Triton's GPU IR (TTGIR): compiled without a GPU, and read into operations."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from saml_kernels.backends.triton.launcher import kernel
from saml_kernels.backends.triton.signature import ALIGNMENT, Launch, signature

LOCATION = re.compile(r' loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*"|\([^()]*\))*\))*\)')
OPERATION = re.compile(r'(?:((?:%[\w$.-]+(?::\d+)?(?:, )?)+) = )?"?([a-z_]+\.[\w.]+)"?(.*)')
NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")


def ttgir(launch: Launch, arch: str) -> str:
    """TTGIR of a launch of the backend for `arch` ("sm_90")."""
    function = kernel(launch.name)
    types, aligned = signature(launch)
    named = dict(zip(function.arg_names, types, strict=False))
    named |= dict.fromkeys(launch.constants, "constexpr")
    constants = {(function.arg_names.index(n),): v for n, v in launch.constants.items()}
    constants |= {(i,): 1 for i, kind in enumerate(types) if kind == "constexpr"}
    return compiled_ttgir(function, named, constants, aligned, arch, launch.warps, launch.stages)


def compiled_ttgir(
    function: Any, named: dict[str, str], constants: dict[tuple[int], Any],
    aligned: list[int], arch: str, warps: int, stages: int,
) -> str:  # fmt: skip
    """TTGIR of a Triton function; arguments at the positions `aligned` are multiples of 16."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    attributes = {(position,): [["tt.divisibility", ALIGNMENT]] for position in aligned}
    source = ASTSource(function, named, constants, attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    asked = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    options = backend.parse_options(asked | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    making = (backend.get_codegen_implementation(options), backend.get_module_map())
    module = source.make_ir(target, options, *making, context)
    steps: dict[str, Any] = {}
    backend.add_stages(steps, options, source.language)
    metadata = {"target": target} | vars(options)
    for step in ("ttir", "ttgir"):
        module = steps[step](module, metadata)
    return str(module)


@dataclass
class Operation:
    """One operation; `results` are (name, how many), `regions` the blocks inside it."""

    name: str
    results: list[tuple[str, int]]
    operands: list[str]
    text: str
    regions: list[list[Operation]] = field(default_factory=list)

    def number(self, attribute: str) -> int:
        """An integer attribute, 0 where it is not said."""
        found = re.search(rf"\b{attribute} = (-?\d+)", self.text)
        return int(found.group(1)) if found else 0


def parse(text: str) -> list[Operation]:
    """The operations of the kernel's function."""
    blocks: list[list[Operation]] = [[]]
    for raw in LOCATION.sub("", text).splitlines():
        line = raw.strip()
        if not line or line.startswith(("#", "//")):
            continue
        if line.startswith("}"):
            blocks.pop()
        else:
            name = line.split()[0].rstrip(":")  # of what is no operation: "module", "^bb0(...)"
            results, rest = "", line
            if (found := OPERATION.match(line)) is not None:
                results, name, rest = found.groups(default="")
            made = [r.strip().partition(":") for r in results.split(",") if r]
            counted = [(r, int(count or 1)) for r, _, count in made]
            blocks[-1].append(Operation(name, counted, NAME.findall(rest), rest))
        if line.endswith("{"):
            blocks[-1][-1].regions.append([])
            blocks.append(blocks[-1][-1].regions[-1])
    (module,) = (o for o in blocks[0] if o.name == "module")
    (function,) = module.regions[0]
    return relevant(function.regions[0], set())


def relevant(block: list[Operation], wanted: set[str]) -> list[Operation]:
    """Without what neither shared memory nor a product nor control flow depends on.

    `wanted` are the values that what follows the block asks for; the block's own are added.
    """
    kept = []
    for o in reversed(block):
        if o.name == "ttg.async_copy_global_to_local":
            o.operands = o.operands[1:2]  # where to; not from where, or under which mask
        dialect = o.name.partition(".")[0]
        effects = dialect in ("ttg", "ttng", "scf", "cf") or o.name in ("tt.dot", "tt.call")
        effects = (effects and o.name != "ttg.convert_layout") or o.name.startswith("^")
        if effects or wanted & {r for r, _ in o.results}:
            if dialect == "scf":
                o.regions = [relevant(r, wanted) for r in o.regions]
            wanted |= {n.partition("#")[0] for n in o.operands}
            kept.append(o)
    return kept[::-1]
