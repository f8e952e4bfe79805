"""Safetensors files: written whole or not at all, checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.files import atomic_path

__all__ = ["TensorHeader", "read_description", "read_headers", "read_metadata", "read_tensors"]

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}


class TensorHeader(NamedTuple):
    """What a safetensors file says of a tensor before its bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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
    with _opened(path) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return tensors, dict(handle.metadata() or {})


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, of which no tensor is read.

    Raises:
        SAMLError: the file is missing, damaged, or not safetensors.
    """
    with _opened(path) as handle:
        return dict(handle.metadata() or {})


def read_description(
    path: str | os.PathLike[str], metadata: dict[str, str], kind: str, version: int, what: str
) -> dict[str, Any]:
    """The JSON that a file of ours has in its metadata under "saml".

    Args:
        path: of the file.
        metadata: from `read_tensors`.
        kind, version: that it must name.
        what: such a file holds.

    Raises:
        SAMLError: it is no JSON object, or names another kind or version.
    """
    try:
        about = json.loads(metadata.get("saml", "null"))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("kind") != kind:
        raise SAMLError(f"{path}: holds no {what}")
    if about.get("version") != version:
        raise SAMLError(
            f"{path}: version {about.get('version')!r}; this saml-kernels reads {version}: upgrade"
        )
    return about


def read_headers(path: str | os.PathLike[str]) -> dict[str, TensorHeader]:
    """The shapes and dtypes of a safetensors file's tensors, none of which is read.

    Raises:
        SAMLError: the file is missing or damaged, not safetensors, or holds another dtype.
    """
    headers = {}
    with _opened(path) as handle:
        for name in handle.keys():  # noqa: SIM118
            piece = handle.get_slice(name)
            if piece.get_dtype() not in _DTYPES:
                raise SAMLError(f"{path}: {name} is {piece.get_dtype()}; expected a plain dtype")
            headers[name] = TensorHeader(tuple(piece.get_shape()), _DTYPES[piece.get_dtype()])
    return headers


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A safetensors file to read from."""
    if not Path(path).is_file():
        raise SAMLError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise SAMLError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
