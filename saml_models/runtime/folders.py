"""Where the user's own files lie: what is downloaded, and the profiles of speakers."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import PlatformDirs

__all__ = ["cache_folder", "data_folder"]

NAME = "saml-kernels"


def cache_folder() -> Path:
    """For what can be made or fetched again: ~/.cache/saml-kernels where that is, or the system's.

    The system's is $XDG_CACHE_HOME/saml-kernels on Linux, ~/Library/Caches/saml-kernels on macOS.
    """
    earlier = Path.home() / ".cache" / NAME
    return earlier if earlier.is_dir() else PlatformDirs(NAME, appauthor=False).user_cache_path


def data_folder() -> Path:
    """For what cannot: ~/.local/share/saml-kernels where that is, or the system's.

    $XDG_DATA_HOME stands for ~/.local/share. The system's is the same on Linux, and
    ~/Library/Application Support/saml-kernels on macOS.
    """
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    earlier = Path(home) / NAME
    return earlier if earlier.is_dir() else PlatformDirs(NAME, appauthor=False).user_data_path
