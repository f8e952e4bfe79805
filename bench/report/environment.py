"""What a measurement was taken on, for its file of results."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.place import REPOSITORY
from saml_kernels.backends.cpu.backend import native_status
from saml_models.runtime.machine import installed, processor

__all__ = ["about", "device_name", "result_path"]

PACKAGES = (
    "saml-kernels", "torch", "triton", "transformers", "bitsandbytes", "peft", "gemlite", "torchao",
    "faster-whisper", "openai-whisper", "lorafusion", "axolotl", "unsloth",
)  # fmt: skip


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{processor()}, {count} thread{'s' * (count > 1)}"


def about(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date; $SAML_COMMIT names it for a copy without git."""
    found: dict[str, Any] = {
        "device": device_name(device), "type": device.type, "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("SAML_COMMIT")
        or _output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in PACKAGES},
    }  # fmt: skip
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
        found |= {"driver": _output([*query, "--format=csv,noheader"]), "cuda": torch.version.cuda}
    else:
        found["cpu"] = native_status()
    return found


def result_path(folder: Path, device: torch.device) -> Path:
    """<device>-<date>.json in a folder."""
    name = "".join(c if c.isalnum() else "-" for c in device_name(device).lower())
    name = "-".join(part for part in name.split("-") if part)
    return folder / f"{name}-{time.strftime('%Y-%m-%d')}.json"


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
