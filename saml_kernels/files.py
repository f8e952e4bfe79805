"""Writing files so that a crash or a full disk never leaves half of one."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saml_kernels.errors import SAMLError, one_line

__all__ = [
    "atomic_folder",
    "atomic_path",
    "check_new_folder",
    "check_output",
    "is_figure",
    "is_json",
    "write_figure",
    "write_json",
]

_MARK = b"saml-kernels"  # in the header of our figures


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


def check_output(
    path: Path, ours: Callable[[Path], bool] | None = None, overwrite: bool = False
) -> None:
    """Refuse, before the work starts, a file that could not be written or is somebody else's.

    Args:
        path: of the file to write.
        ours: whether a file that is there was written by the same command, and may be replaced;
            None: nobody can tell.
        overwrite: the user said so.

    Raises:
        SAMLError: it is a folder, lies below a file or where nothing may be written, or is there
            already.
    """
    if path.is_dir():
        raise SAMLError(f"{path}: is a folder; expected the name of a file to write")
    parent = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not parent.is_dir():
        raise SAMLError(f"{path}: cannot be written: {parent} is a file; expected a folder")
    if not os.access(parent, os.W_OK):
        raise SAMLError(f"{path}: cannot be written: {parent} is not yours to write to")
    if not os.path.lexists(path) or overwrite or (ours is not None and ours(path)):
        return
    raise SAMLError(
        f"{path}: is there already and would be replaced; move it, write elsewhere, or say "
        "--overwrite"
    )


def is_json(*keys: str) -> Callable[[Path], bool]:
    """Whether a file is a JSON object with these keys, or a list that begins with one."""

    def has_keys(path: Path) -> bool:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        value = value[0] if isinstance(value, list) and value else value
        return isinstance(value, dict) and all(key in value for key in keys)

    return has_keys


def is_figure(path: Path) -> bool:
    """Whether a file is what `write_figure` writes."""
    try:
        with open(path, "rb") as handle:
            return _MARK in handle.read(1024)
    except OSError:
        return False


def write_figure(path: str | os.PathLike[str], figure: Any, dpi: int = 120) -> None:
    """Write a Matplotlib figure as PNG, atomically.

    Raises:
        SAMLError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": _MARK.decode()})


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


_JSON_LIMIT = 64 * 2**20  # bytes; the largest tokenizer.json is 4 MB


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size."""
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise SAMLError(f"{path}: is larger than {_JSON_LIMIT >> 20} MiB; expected a JSON file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SAMLError(
            f"{path}: cannot be read: {error.strerror}; copy it from the original model's folder"
        ) from error
    except SAMLError:
        raise
    except (ValueError, RecursionError) as error:
        raise SAMLError(f"{path}: is no JSON: {one_line(error)}; download it again") from error
    require(isinstance(content, dict), path, "a JSON object")
    return dict(content)


def require(condition: bool, path: Path, expected: str) -> None:
    if not condition:
        raise SAMLError(f"{path}: expected {expected}; download it again")
