"""Kernel launches: compiled by Triton at their first use, or taken from a folder built beforehand.

Kernels go by name, so that a machine without Triton (there is no wheel for Jetson boards) runs
what `python -m saml_kernels.aot` built elsewhere: set SAML_KERNELS=FOLDER, or call `load_kernels`.

A `Launcher` asks Triton's JIT function (or the folder) once which compiled kernel serves its call
and starts that one from then on: looking it up again at every call takes longer than most kernels.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from saml_kernels.backends.triton.configs import table_changed
from saml_kernels.backends.triton.prebuilt import Prebuilt
from saml_kernels.backends.triton.signature import Launch, Varying, key_of, kinds_of

__all__ = [
    "KERNELS",
    "Launcher",
    "interpreting",
    "load_kernels",
    "on_device",
    "prebuilt",
    "precision",
    "recording",
    "starting_with",
    "triton_errors",
]

# The module of each kernel, which is called <name>_kernel there.
KERNELS = {
    "product": "product", "reduce": "product", "persistent": "product", "single": "single",
    "partial": "decode", "finish": "decode",
    "project": "projection", "dequantize": "dequantize",
    "backward": "backward", "finish_backward": "backward", "gradients": "gradients",
}  # fmt: skip

Start = Callable[..., Any]


# Read once, as Triton does: at every call it would be a good part of what a launch costs.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU, as it reads its own variable."""
    return _INTERPRETING


def precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user's torch setting allows TF32."""
    if dtype == torch.bfloat16 and interpreting():
        return "emulated"
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def triton_errors(*names: str) -> tuple[type[Exception], ...]:
    """Triton's own exceptions, which are no RuntimeErrors; none where it is not installed."""
    if find_spec("triton") is None:
        return ()
    errors = importlib.import_module("triton.runtime.errors")
    return tuple(getattr(errors, name) for name in names)


_recorded: list[Launch] | None = None
_loaded: Prebuilt | None = None
_bind: Callable[[Launch], Start] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the block kernels are noted down instead of launched."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@contextlib.contextmanager
def starting_with(bind: Callable[[Launch], Start]) -> Iterator[None]:
    """Within the block `bind` says how a kernel is started: called with (its arguments) later.

    For measurements of what a call costs before the device starts, on tensors of the CPU.
    """
    global _bind
    before, _bind = _bind, bind
    table_changed()
    try:
        yield
    finally:
        _bind = before
        table_changed()


def standing_in() -> bool:
    """Whether tensors of the CPU go to these kernels: interpreted, or started with something."""
    return _bind is not None or interpreting()


def load_kernels(folder: str | Path | None) -> None:
    """Take kernels from a folder that `python -m saml_kernels.aot` made; None goes back to Triton.

    Raises:
        SAMLError: not such a folder.
    """
    global _loaded
    _loaded = None if folder is None else Prebuilt(Path(folder))
    table_changed()


def prebuilt() -> Prebuilt | None:
    """What `load_kernels` or $SAML_KERNELS chose."""
    if _loaded is None and os.environ.get("SAML_KERNELS"):
        load_kernels(os.environ["SAML_KERNELS"])
    return _loaded


class on_device:
    """Within the block `device` is CUDA's current one; free where it is already, or is none."""

    __slots__ = ("before", "index")

    def __init__(self, device: torch.device) -> None:
        self.index = device.index if device.type == "cuda" else None

    def __enter__(self) -> None:  # noqa: D105
        self.before = -1
        if self.index is not None and torch._C._cuda_getDevice() != self.index:
            self.before = torch._C._cuda_exchangeDevice(self.index)

    def __exit__(self, *unused: Any) -> None:  # noqa: D105
        if self.before >= 0:
            torch._C._cuda_maybeExchangeDevice(self.before)


class Launcher:
    """One kernel with its grid and compile-time facts; called with the arguments that vary.

    All calls of one launcher must agree in the dtypes, alignments and unit sizes of their
    arguments: what it starts was compiled for those of the first.
    """

    __slots__ = ("constants", "grid", "name", "stages", "start", "warps")

    def __init__(
        self, name: str, grid: tuple[int, ...], warps: int, stages: int, **constants: Any
    ) -> None:
        self.name, self.grid, self.warps, self.stages = name, grid, warps, stages
        self.constants = constants
        self.start: Start | None = None

    def __call__(self, *arguments: Any) -> None:
        """Start the kernel on the current stream of the current device, that of the tensors."""
        if _recorded is not None:
            _recorded.append(self.launch(arguments))
        elif self.start is None:
            self._first(arguments)
        else:
            self.start(*arguments)

    def launch(self, arguments: tuple[Any, ...]) -> Launch:
        """What a call with these arguments is."""
        return Launch(self.name, self.grid, arguments, self.constants, self.warps, self.stages)

    def _first(self, arguments: tuple[Any, ...]) -> None:
        launch = self.launch(arguments)
        if _bind is not None:
            self.start = _bind(launch)
        elif interpreting():
            self.start = _checked(self, kinds_of(launch))
        else:
            ready = prebuilt()
            device = torch.cuda.current_device()
            if ready is not None:
                capability = torch.cuda.get_device_capability(device)
                self.start = ready.bind(key_of(launch), launch, device, capability)
            else:
                self.start = _compiled(launch, device)
                return  # asking has started it
        self.start(*arguments)


def _checked(launcher: Launcher, first: tuple[Any, ...]) -> Start:
    """What interprets a launcher's calls: a compiled kernel would be that of the first one."""

    def start(*arguments: Any) -> Any:
        launch = launcher.launch(arguments)
        if kinds_of(launch) != first:
            raise AssertionError(f"{launcher.name}: compiled for {first}, not {kinds_of(launch)}")
        return _ask_triton(launch)

    return start


def _ask_triton(launch: Launch) -> Any:
    """Start a kernel by way of its JIT function, which compiles it where need be."""
    plain = (int(a) if isinstance(a, Varying) else a for a in launch.arguments)
    # Fusion is said explicitly: Triton's default is about to change, and bits with it.
    start = partial(
        kernel(launch.name)[launch.grid], *plain, **launch.constants,
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
        **({"launch_pdl": True} if launch.constants.get("WAITS") else {}),
    )  # fmt: skip
    return start() if interpreting() else _with_memory(start)


def _with_memory(start: Callable[[], Any]) -> Any:
    """Call `start` where kernels get memory for the tensor descriptors that they make.

    PyTorch's caching allocator gives it, as it gives results. Whatever allocator the caller has
    told Triton of stays his.
    """

    def run() -> Any:
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda")
        )
        return start()

    triton = importlib.import_module("triton")
    return contextvars.copy_context().run(run)


_kernels: dict[tuple[Any, ...], Any] = {}  # compiled ones, by what tells them apart and device


def _compiled(launch: Launch, device: int) -> Start:
    """How to start the compiled kernel of a launch, which is started as well."""
    key = (kinds_of(launch), device)
    made = _kernels.get(key)
    if made is None:
        made = _kernels[key] = _ask_triton(launch)
        return started(made, launch, device)
    start = started(made, launch, device)
    start(*launch.arguments)
    return start


def started(
    made: Any, launch: Launch, device: int, stream_of: Callable[[int], int] | None = None
) -> Start:
    """A call of Triton's compiled kernel itself, without its JIT function.

    `stream_of` stands in for PyTorch's current stream.
    """
    run, function, packed = made.run, made.function, made.packed_metadata
    x, y, z = (*launch.grid, 1, 1)[:3]
    names = kernel(launch.name).arg_names
    constants = tuple(launch.constants[n] for n in names[len(launch.arguments) :])
    stream_of = stream_of or torch._C._cuda_getCurrentRawStream

    def start(*arguments: Any) -> None:
        stream = stream_of(device)
        run(x, y, z, stream, function, packed, None, None, None, *arguments, *constants)

    if not getattr(made.metadata, "global_scratch_size", 0):  # AMD's kernels do not say
        return start
    return lambda *arguments: _with_memory(partial(start, *arguments))


@cache
def kernel(name: str) -> Any:
    """The Triton function of a kernel."""
    module = importlib.import_module(f"saml_kernels.backends.triton.kernels.{KERNELS[name]}")
    return getattr(module, f"{name}_kernel")
