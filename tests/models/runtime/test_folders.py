"""Where the user's own files lie, for users without a home and in closed ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from saml_kernels import SAMLError
from saml_models.runtime.folders import cache_folder, data_folder


@pytest.mark.parametrize("find", [cache_folder, data_folder])
def test_a_closed_home_is_as_good_as_an_empty_one(
    find: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", closed)
    assert find().name == "saml-kernels"


@pytest.mark.parametrize("find", [cache_folder, data_folder])
def test_no_home_is_one_line(find: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    with pytest.raises(SAMLError, match=r"set HOME, .* SAML_SPEAKERS or --store"):
        find()
