"""Safetensors files: written whole or not at all, checked when read."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.files import atomic_path

__all__ = ["read_tensors"]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    # Through Python's own write, so that a full disk is an OSError with its reason.
    data = serialise({n: t.contiguous().cpu() for n, t in tensors.items()}, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        SAMLError: the file is missing, damaged, or not safetensors.
    """
    if not Path(path).is_file():
        raise SAMLError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise SAMLError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
