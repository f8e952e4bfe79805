"""A saved model, which tests copy before they damage it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_models import make


@pytest.fixture(scope="session")
def folder(tiny_en: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and a processor, as transformers saves them."""
    path = tmp_path_factory.mktemp("saved") / "m"
    make().save_pretrained(path)
    tiny_en[1].save_pretrained(path)
    return path
