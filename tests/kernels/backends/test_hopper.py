"""What Hopper and later have, compiled: tensor descriptors, dependent launches."""

import ctypes
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton.backends.nvidia

from saml_kernels import aot
from saml_kernels.backends.triton import backend, configs, launcher, prebuilt
from saml_kernels.backends.triton.configs import Config
from saml_kernels.backends.triton.launcher import interpreting, recording
from saml_kernels.backends.triton.signature import Launch, key_of, signature
from saml_kernels.quantization.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(interpreting(), reason="nothing is compiled in the interpreter")

# Of a warp group, into tensor memory, of a warp.
PRODUCT = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
COPY = "UTMALDG"
STACK = {"sm_120": 8}  # Triton 3.6's assembler keeps as much beside 0 bytes of spills
SHARED = {"sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}


def offered(arch: str) -> Config:
    """What the default table has for this architecture."""
    found = [c for c in configs.serving("forward", 1500, arch) if c.loads == "descriptors"]
    assert len(found) == 1
    return found[0]


def sass(launch: Launch, arch: str, folder: Path) -> tuple[str, aot.Built]:
    """Machine code, and what it takes."""
    built = aot._compile(launch, key_of(launch), arch, folder)
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    done = subprocess.run(
        [tool, "-sass", folder / built.file], capture_output=True, text=True, check=True
    )
    return done.stdout, built


def launches_of(
    arch: str, way: Config, dtype: torch.dtype, m: int = 1500, device: str = "meta"
) -> list[Launch]:
    """The kernels of a call that `way` serves."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    weight = QuantizedTensor.empty((512, 2048), "nf4", device=device)
    a, b, router = tensor(4, 16, 2048), tensor(4, 512, 16), tensor(4, 2048)
    with configs.pretending(arch, 132), recording() as found:
        backend.forward(
            tensor(m, 2048), weight, a, b, router, tensor(512), 1.0,
            routing=(None, 1.0), route=way,
        )  # fmt: skip
    return found


@pytest.mark.parametrize("arch", PRODUCT)
def test_tiles_are_copied_by_the_accelerator_and_nothing_spills(arch, tmp_path):
    launch = launches_of(arch, offered(arch), torch.bfloat16)[-1]
    assert launch.name == "persistent"
    text, built = sass(launch, arch, tmp_path)
    used = {name: len(re.findall(rf"\b{name}\b", text)) for name in (COPY, PRODUCT[arch])}
    assert used[COPY] >= 4 and used[PRODUCT[arch]] >= 2  # X, W, H and B; within the loop and after
    assert built.spilled <= STACK.get(arch, 0) and built.shared <= SHARED[arch]
    assert built.memory == 4 * 128  # a descriptor each


def test_older_architectures_are_not_offered_it():
    for arch in ("sm_80", "sm_86", "sm_87", "sm_89"):
        every = configs.serving("forward", 1500, arch)
        assert {c.loads for c in every} == {"pointers"}
        way = Config("dense", 128, 128, 64, 1, 8, loads="descriptors")
        assert launches_of(arch, way, torch.float16)[-1].name == "product"
        way = Config("decode", 16, 32, 64, 4, dependent=True)
        constants = {**launches_of(arch, way, torch.float16, 4)[-1].constants}
        assert constants["WAITS"] is False


def test_a_table_may_name_the_capabilities_that_an_entry_serves():
    entry = {"min_m": 1, "on": ["sm_90"], "route": "dense", "loads": "descriptors"}
    rules = configs.read_table(json.dumps({"forward": [entry], "backward": []}), "a table")
    assert rules["forward"][0][0] == {"min_m": 1, "on": ["sm_90"]}


def test_a_prebuilt_one_gets_memory_for_its_descriptors():
    launch = launches_of("sm_90", offered("sm_90"), torch.float16, device="cpu")[-1]
    sent = []

    def start(function, *rest):
        sent.extend(ctypes.c_void_p.from_address(p).value or 0 for p in list(rest[8]))
        return 0

    driver = prebuilt.Driver(SimpleNamespace(cuLaunchKernel=start), lambda device: 0)
    kinds = [kind for kind in signature(launch)[0] if kind != "constexpr"]
    sizes = [8 if kind.startswith("*") or kind == "i64" else 4 for kind in kinds]
    for memory in (512, 0):
        call = prebuilt.started(
            driver, ctypes.c_void_p(1), launch, 0, 256, 0, [*sizes, 8, 8], memory
        )  # fmt: skip
        call(*launch.arguments)
    of_descriptors, of_a_profiler = sent[len(kinds) : len(kinds) + 2]
    assert of_descriptors and not of_a_profiler and not any(sent[-2:])


def test_the_callers_own_allocator_stays():
    from triton.runtime import _allocation

    launch = launches_of("sm_90", offered("sm_90"), torch.float16)[-1]
    found, before = [], _allocation._allocator.get()
    made = SimpleNamespace(
        run=lambda *given: found.append(_allocation._allocator.get()), function=None,
        packed_metadata=None, metadata=SimpleNamespace(global_scratch_size=512),
    )  # fmt: skip
    launcher.started(made, launch, 0, lambda device: 0)(*launch.arguments)
    assert found[0] is not before and _allocation._allocator.get() is before


def test_a_dependent_launch_waits_before_it_reads(tmp_path, monkeypatch):
    way = Config("decode", 16, 32, 64, 4, dependent=True)
    first, second = launches_of("sm_90", way, torch.float16, 4)
    asked = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, **options: asked.append(options.get("launch_pdl", False))

    monkeypatch.setattr(launcher, "kernel", lambda name: Kernel())
    for launch in (first, second):
        launcher._ask_triton(launch)
    assert asked == [False, True]  # before the first the whole of x must be there
    monkeypatch.undo()
    # PREEXIT and ACQBULK are griddepcontrol's two, LDG loads from memory.
    text, _ = sass(first, "sm_90", tmp_path)
    assert "PREEXIT" in text and "ACQBULK" not in text
    text, _ = sass(second, "sm_90", tmp_path)
    assert "PREEXIT" not in text and 0 < text.index("ACQBULK") < text.index("LDG")
