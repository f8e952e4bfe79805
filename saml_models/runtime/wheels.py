"""Files inside installed wheels, each verified by its SHA-256."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from saml_kernels.errors import SAMLError

__all__ = ["WheelFile"]


@dataclass(frozen=True)
class WheelFile:
    """One file of a wheel: the wheel as pip pins it, the file's path in it, its SHA-256."""

    requirement: str
    path: str
    sha256: str


def verified(file: WheelFile) -> Path:
    """Where the file lies, its content verified once per process."""
    package = file.requirement.partition("==")[0]
    path = Path(str(distribution(package).locate_file(file.path)))
    try:
        stat = path.stat()
        digest = _sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise SAMLError(
            f"{path}: cannot be read: {error.strerror}; "
            f"pip install --force-reinstall '{file.requirement}'"
        ) from error
    if digest != file.sha256:
        raise SAMLError(
            f"{path}: has SHA-256 {digest}, expected {file.sha256}; "
            f"pip install --force-reinstall '{file.requirement}'"
        )
    return path


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Hexadecimal SHA-256 of a file; size and time are there so that a changed file is new."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
