"""Models by name or path, in full precision or compressed."""

from __future__ import annotations

import os
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import torch

import saml_models.compress.quantizer  # noqa: F401 (its import tells transformers)
from saml_kernels.errors import SAMLError, one_line
from saml_kernels.files import read_json
from saml_models.compress.checkpoint import DESCRIPTION, load_saml
from saml_models.compress.difference import find_difference, read_difference
from saml_models.compress.pretrained_folder import CONFIG, is_pretrained_folder
from saml_models.models.conformer.loading import is_conformer, load_conformer
from saml_models.models.registry import kind_named
from saml_models.models.whisper.loading import load_whisper
from saml_models.runtime.devices import on_device
from saml_models.runtime.tensors import read_headers

__all__ = ["load_model"]


def load_model(
    name_or_path: str | os.PathLike[str], device: str | torch.device | None = None
) -> tuple[Any, Any]:
    """A model with its processor, compressed where it was saved so.

    Args:
        name_or_path: a folder that `save_saml` or, with the processor's files beside the model's,
            `save_pretrained` wrote; a Conformer that ships with the package, by its name, or a
            file that `write_difference` wrote; or what `load_whisper` or `load_conformer` know: a
            name, a hub's id or a folder. A folder comes before a name.
        device: None is the CPU.

    Raises:
        SAMLError: the model cannot be found, is damaged, or is of no known kind; or the device
            is not there.
    """
    folder = Path(name_or_path).expanduser()
    if (folder / DESCRIPTION).is_file():
        model, processor = load_saml(folder, device)
        model.config._name_or_path = os.fspath(name_or_path)
    elif (difference := find_difference(name_or_path)) is not None:
        with as_file(difference) as file:
            model, processor = read_difference(file)
        model.config._name_or_path = os.fspath(name_or_path)
        on_device(model, device)
    else:
        if is_pretrained_folder(folder):
            _check_extent(folder)
        load = load_conformer if is_conformer(name_or_path) else load_whisper
        model, processor = load(name_or_path, device)
    return model, processor


def _check_extent(folder: Path) -> None:
    """A configuration that asks for more layers than its files hold is refused unbuilt."""
    tensors = sum(len(read_headers(file)) for file in folder.glob("*.safetensors"))
    values = read_json(folder / CONFIG)
    kind = kind_named(values.get("model_type"))
    try:
        fits = kind.fits(kind.config_class.from_dict(values), tensors)
    except Exception as error:  # whatever transformers makes of values it does not expect
        raise SAMLError(f"{folder / CONFIG}: {one_line(error)}; copy it again") from error
    if not fits:
        raise SAMLError(
            f"{folder / CONFIG}: asks for more weights than its files hold; copy the folder again"
        )
