"""Models by name or path, in full precision or compressed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from saml_models.compress.checkpoint import DESCRIPTION, load_saml
from saml_models.compress.layers import compression_of
from saml_models.models.conformer.loading import is_conformer, load_conformer
from saml_models.models.interface import QUANTISED_MARGIN
from saml_models.models.whisper.loading import load_whisper

__all__ = ["load_model"]


def load_model(
    name_or_path: str | os.PathLike[str], device: str | torch.device | None = None
) -> tuple[Any, Any]:
    """A folder that `save_saml` wrote, or what `load_whisper` or `load_conformer` know.

    Args:
        name_or_path: a name, a hub's id or a folder; a folder comes before a name.
        device: None is the CPU.

    Raises:
        SAMLError: the model cannot be found, is damaged, or is of no known kind; or the device
            is not there.
    """
    folder = Path(name_or_path).expanduser()
    if (folder / DESCRIPTION).is_file():
        model, processor = load_saml(folder, device)
        model.config._name_or_path = os.fspath(name_or_path)
        compression_of(model).margin = QUANTISED_MARGIN
        return model, processor
    load = load_conformer if is_conformer(name_or_path) else load_whisper
    return load(name_or_path, device)
