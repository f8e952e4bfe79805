"""Writing files so that a crash or a full disk never leaves half of one."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saml_kernels.errors import SAMLError

__all__ = ["atomic_folder", "atomic_path", "check_new_folder", "write_json"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it over `path` when the block ends well.

    The temporary file is flushed to disk before the rename (POSIX `rename` is atomic), so `path`
    holds either its old content or the whole new one. On any exception the temporary is removed.

    Raises:
        SAMLError: the file cannot be written (no such folder, no permission, disk full).
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SAMLError(f"{target}: cannot be written: {reason}; nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(path: Path) -> None:
    """Refuse a path where something is.

    Raises:
        SAMLError: it is a file, or a folder that is not empty.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise SAMLError(f"{path}: is there already; remove it or give a new folder")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; it becomes `path` when everything in it is written."""
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        SAMLError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))
