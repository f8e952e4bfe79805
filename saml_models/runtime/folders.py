"""Where the user's own files lie: what is downloaded, and the profiles of speakers."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import PlatformDirs

from saml_kernels.errors import SAMLError

__all__ = ["cache_folder", "data_folder"]

NAME = "saml-kernels"


def cache_folder() -> Path:
    """For what can be made or fetched again: ~/.cache/saml-kernels where that is, or the system's.

    The system's is $XDG_CACHE_HOME/saml-kernels on Linux, ~/Library/Caches/saml-kernels on macOS.

    Raises:
        SAMLError: the user has no home folder.
    """
    earlier = _home() / ".cache" / NAME
    return earlier if _is_there(earlier) else PlatformDirs(NAME, appauthor=False).user_cache_path


def data_folder() -> Path:
    """For what cannot: ~/.local/share/saml-kernels where that is, or the system's.

    $XDG_DATA_HOME stands for ~/.local/share. The system's is the same on Linux, and
    ~/Library/Application Support/saml-kernels on macOS.

    Raises:
        SAMLError: the user has no home folder.
    """
    home = os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share"
    earlier = Path(home) / NAME
    return earlier if _is_there(earlier) else PlatformDirs(NAME, appauthor=False).user_data_path


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise SAMLError(
            "the user has no home folder; set HOME, or for enrolled speakers SAML_SPEAKERS or "
            "--store to a folder"
        ) from error


def _is_there(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # in a folder that is closed to this user
        return False
