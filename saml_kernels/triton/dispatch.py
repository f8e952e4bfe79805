"""One kernel launch: compiled by Triton at its first use, or taken from a folder built beforehand.

Kernels go by name, so that a machine without Triton (there is no wheel for Jetson boards) runs
what `python -m saml_kernels.aot` built elsewhere: set SAML_KERNELS=FOLDER, or call `load_kernels`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saml_kernels.triton.prebuilt import Prebuilt
from saml_kernels.triton.signature import Launch, Varying, key_of

__all__ = [
    "KERNELS",
    "interpreting",
    "launch",
    "load_kernels",
    "prebuilt",
    "recording",
    "triton_errors",
]

# The module of each kernel, which is called <name>_kernel there.
KERNELS = {
    "product": "product", "reduce": "product", "partial": "decode", "finish": "decode",
    "skinny": "skinny", "router_gradient": "skinny", "outer": "outer", "scratch": "scratch",
}  # fmt: skip


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU, as it reads its own variable."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def triton_errors(*names: str) -> tuple[type[Exception], ...]:
    """Triton's own exceptions, which are no RuntimeErrors; none where it is not installed."""
    if find_spec("triton") is None:
        return ()
    errors = importlib.import_module("triton.runtime.errors")
    return tuple(getattr(errors, name) for name in names)


_recorded: list[Launch] | None = None
_loaded: Prebuilt | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the block kernels are noted down instead of launched."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def load_kernels(folder: str | Path | None) -> None:
    """Take kernels from a folder that `python -m saml_kernels.aot` made; None goes back to Triton.

    Raises:
        SAMLError: not such a folder.
    """
    global _loaded
    _loaded = None if folder is None else Prebuilt(Path(folder))


def prebuilt() -> Prebuilt | None:
    """What `load_kernels` or $SAML_KERNELS chose."""
    if _loaded is None and os.environ.get("SAML_KERNELS"):
        load_kernels(os.environ["SAML_KERNELS"])
    return _loaded


def launch(
    name: str, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int, **constants: Any
) -> None:
    """Start a kernel on the current stream of its first tensor's device."""
    made = Launch(name, grid, arguments, constants, warps, stages)
    if _recorded is not None:
        _recorded.append(made)
        return
    first = next(a for a in arguments if isinstance(a, Tensor))
    ready = prebuilt() if first.is_cuda else None
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        if ready is not None:
            stream = torch.cuda.current_stream().cuda_stream
            capability = torch.cuda.get_device_capability()
            ready.launch(key_of(made), made, stream, torch.cuda.current_device(), capability)
            return
        plain = (int(a) if isinstance(a, Varying) else a for a in arguments)
        # Fusion is said explicitly: Triton's default is about to change, and bits with it.
        kernel(name)[grid](
            *plain, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True
        )


@cache
def kernel(name: str) -> Any:
    """The Triton function of a kernel."""
    module = importlib.import_module(f"saml_kernels.triton.{KERNELS[name]}")
    return getattr(module, f"{name}_kernel")
