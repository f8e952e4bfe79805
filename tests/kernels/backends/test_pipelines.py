"""No pipelined loop of the kernels may multiply another iteration's tile; see pipelines.py."""

import os
import random
import re
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

import pipelines
import triton
import triton.language as tl
from gpu_ir import compiled_ttgir, ttgir

from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton.configs import ROUTES, Config, pretending
from saml_kernels.backends.triton.facts import weight_parts
from saml_kernels.backends.triton.launcher import interpreting, recording
from saml_kernels.backends.triton.plan import backward_plan, forward_plan
from saml_kernels.backends.triton.signature import Launch, key_of
from saml_kernels.quantization.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(interpreting(), reason="nothing is compiled in the interpreter")

PROCESSORS = {"sm_80": 108, "sm_87": 16, "sm_90": 132, "sm_120": 170}
PERSISTENT = Config("dense", 128, 64, loads="descriptors")

STAGES = (2, 3, 4, 5)
WAYS = (
    None, *ROUTES, Config(), Config("decode", 16, 32, 64, 2, scale="after"),
    PERSISTENT,
    *(Config("single", 16, 32, 256, 2, stages=s) for s in STAGES[:2]),
    *(Config(route, stages=s) for route in ("fused", "dense") for s in STAGES),
    *(Config(route, split=2, stages=s) for route in ("decode", "split") for s in STAGES),
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16)
# x and experts: the layer's type, or float32 as an optimizer holds them.
TYPES = (*zip(DTYPES, DTYPES, strict=True), *((dtype, torch.float32) for dtype in DTYPES))
EXPERTS = ((4, 16), (16, 4), (4, 4), (8, 16))  # E, r; R + E is a multiple of 16 or not
TOKENS = (1, 24, 48, 200, 300, 1500)  # one at least in each band of the default table
WIDTHS = ((512, 512), (512, 2048), (2048, 512))  # N, K
ROUTINGS = (None, (None, 1.0), (2, 0.5))  # gates given, or a token router
# Of some 13,000 calls an architecture as many are compiled, always the same ones.
CHOSEN = int(os.environ.get("PIPELINES", "20"))


def calls(arch: str) -> list[tuple]:
    """Layers and ways: the reported one by every route first, then a choice of all."""
    known = [
        ((torch.float16, torch.float16), (4, 16), routing, 300, (512, 512), route)
        for routing in ROUTINGS[:2] for route in ROUTES
    ]  # fmt: skip
    every = [
        call for call in product(TYPES, EXPERTS, ROUTINGS, TOKENS, WIDTHS, WAYS)
        if not isinstance(call[-1], Config) or call[3] in (1, 300)  # the others go by the tokens
    ]  # fmt: skip
    return known + random.Random(arch).sample(every, min(CHOSEN, len(every)))


def launches(arch: str, call: tuple) -> tuple[list[Launch], list[Launch]]:
    """What the backend would launch: forward; forward that keeps P, and backward."""
    (dtype, expert_dtype), (experts, rank), routing, m, (n, k), way = call

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    weight = QuantizedTensor.empty((n, k), "nf4", device="meta")
    gates = tensor(m, experts)
    if routing is not None:
        gates = tensor(experts, k, dtype=expert_dtype)
    a = tensor(experts, rank, k, dtype=expert_dtype)
    b = tensor(experts, n, rank, dtype=expert_dtype)
    bias, how = tensor(n, dtype=expert_dtype), {"routing": routing, "route": way}
    with pretending(arch, PROCESSORS.get(arch, 148)):
        with recording() as forward:
            backend.forward(tensor(m, k), weight, a, b, gates, bias, 1.0, **how)
        with recording() as both:
            x, dy, parts = tensor(m, k), tensor(m, n), weight_parts(weight)
            given = (weight, a, b, gates)
            facts = backend.facts_of(x, *given, bias, None, routing, route=way)
            kept = forward_plan(facts, True)(x, parts, a, None, b, None, gates, bias, None, 1.0)
            facts = backend.facts_of(x, *given, None, None, routing, dy=dy, route=way)
            plan = backward_plan(facts, (True,) * 4, True)
            plan(dy, x, parts, a, b, gates, None, 1.0, *kept[1:])
    return forward, both


@pytest.mark.parametrize("arch", PROCESSORS)
def test_every_read_finds_its_own_iteration(arch):
    reports: dict[str, pipelines.Report] = {}
    faults, directions = [], [0, 0]
    for call in calls(arch):
        for direction, found in enumerate(launches(arch, call)):
            for launch in found:
                key = key_of(launch)
                if key not in reports:
                    reports[key] = pipelines.check(ttgir(launch, arch))
                    faults += [f"{launch.name} of {call}: {f}" for f in reports[key].faults[:2]]
                    if launch.stages > 1:
                        assert reports[key].buffers, f"{launch.name} of {call}: not pipelined"
                directions[direction] += max(reports[key].buffers.values(), default=0) > 1
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:20])
    assert all(directions), "no buffer of several slots"


@pytest.mark.parametrize("arch", ["sm_87", "sm_90"])
def test_codes_are_read_sixteen_bytes_at_a_time(arch):
    """As they lie in the file: rows of packed bytes, which a layout of their own would not help."""
    call = ((torch.float16,) * 2, (4, 16), (None, 1.0), 1, (512, 512), "single")
    (launch,), _ = launches(arch, call)
    text = ttgir(launch, arch)
    copies = re.findall(r"async_copy_global_to_local .*tensor<\w+x!tt.ptr<i8>, (#\w+)>", text)
    assert copies
    for layout in copies:
        (per_thread,) = re.findall(
            rf"^{layout} = #ttg.blocked<{{sizePerThread = (\[.*?\])", text, re.M
        )
        assert per_thread == "[1, 16]"


WITHOUT = {  # waits that are left out of the IR, and what is then said; sm_100's products all wait
    "sm_90": ("", "before it was waited for"),
    "sm_100": (".* deps ", "while a product reads it"),
    "sm_120": ("", "before it was waited for"),
}


@pytest.mark.parametrize("arch", WITHOUT)
def test_tiles_that_descriptors_bring(arch):
    call = ((torch.float16,) * 2, (4, 16), (None, 1.0), 1500, (512, 2048), PERSISTENT)
    *_, launch = launches(arch, call)[0]
    text = ttgir(launch, arch)
    report = pipelines.check(text)
    assert launch.name == "persistent" and not report.faults
    assert max(report.buffers.values()) > 1
    which, message = WITHOUT[arch]
    hasty = pipelines.check(re.sub(rf"(?m)^.*ttng.wait_barrier{which}.*$", "", text))
    assert any(message in fault for fault in hasty.faults), hasty


# The checker itself: a kernel that is right, one that is not, and a right one's IR made wrong.


@triton.jit
def _product(h, b, y, D, GUARDED: tl.constexpr, BLOCK: tl.constexpr):
    """y [BLOCK, BLOCK] = h [BLOCK, D] b [D, BLOCK]; GUARDED skips rows of b where h is zero."""
    rows = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, D, BLOCK):
        columns = first + rows
        left = tl.load(h + rows[:, None] * D + columns[None, :])
        wanted = columns < D
        if GUARDED:
            wanted = tl.max(tl.abs(left.to(tl.float32)), 0) > 0
        at = b + columns[:, None] * BLOCK + rows[None, :]
        acc = tl.dot(left, tl.load(at, wanted[:, None], 0.0), acc)
    tl.store(y + rows[:, None] * BLOCK + rows[None, :], acc)


def product_ir(arch: str, stages: int, guarded: bool) -> str:
    types = {"h": "*fp16", "b": "*fp16", "y": "*fp32", "D": "i32"}
    types |= {"GUARDED": "constexpr", "BLOCK": "constexpr"}
    constants = {(4,): guarded, (5,): 64}
    return compiled_ttgir(_product, types, constants, [0, 1, 2, 3], arch, 4, stages)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("arch", PROCESSORS)
def test_a_right_kernel(arch, stages):
    report = pipelines.check(product_ir(arch, stages, False))
    assert not report.faults
    assert len(report.buffers) == 2 and min(report.buffers.values()) >= stages - 1


@pytest.mark.parametrize("stages", STAGES)
def test_a_load_guarded_by_what_the_loop_multiplies(stages):
    """Triton counts too few slots for `left`, which Hopper multiplies where it lies."""
    report = pipelines.check(product_ir("sm_90", stages, True))
    pattern = re.compile(r"warp_group_dot multiplies copy 0 of %\w+, copy [1-9] of %left")
    assert any(pattern.search(fault) for fault in report.faults), report


# What is replaced, by what, and what the check says; SLOTS is 3 on sm_80 and 4 on sm_90.
MUTATIONS = {
    "fewer slots": ("memdesc<SLOTSx", "memdesc<FEWERx", "no slot"),
    "wraps early": (r"(%cSLOTS_i32 = arith.constant) SLOTS", r"\1 FEWER", "finds copy|reads it"),
    "reads the next": ("= %c-1_i32,", "= %c0_i32,", "finds copy"),
    "copies elsewhere": (r"(index %left\w*)\[%c0_i32", r"\1[%c1_i32", "finds nothing|finds copy"),
    "first two exchanged": (
        r"(index %left\w*\[%c)([01])_", lambda m: f"{m[1]}{1 - int(m[2])}_", "multiplies|expected"
    ),
    "waits for too few": (r"num = 4 :", "num = 5 :", "before it was waited for"),
    "leaves products running": ("pendings = 1 :", "pendings = 2 :", "while a product reads it"),
}  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_right_kernel_made_wrong(mutation, arch):
    text = product_ir(arch, 4, False)
    slots = max(pipelines.check(text).buffers.values())
    pattern, changed, message = MUTATIONS[mutation]
    if isinstance(changed, str):
        changed = changed.replace("FEWER", str(slots - 1))
    wrong = re.sub(pattern.replace("SLOTS", str(slots)), changed, text)
    if "pendings" in pattern and arch == "sm_80":
        assert wrong == text  # its products are not asynchronous
        return
    assert wrong != text
    report = pipelines.check(wrong)
    assert any(re.search(message, fault) for fault in report.faults), report


def test_what_is_not_understood_is_a_fault():
    text = product_ir("sm_80", 3, False).replace("ttg.local_load", "ttg.local_gather")
    assert any("not followed" in fault for fault in pipelines.check(text).faults)
