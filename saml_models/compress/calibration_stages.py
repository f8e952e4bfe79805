"""Finished stages of a calibration on disk, found again when it is started again."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from saml_kernels import QuantizedTensor, SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.layers.embedding import FinerRows
from saml_models.compress.calibration import finer_of, split_finer, stored_finer
from saml_models.compress.calibration_walk import Found
from saml_models.runtime.tensors import read_metadata, read_tensors, write_tensors

__all__ = ["check_stages", "fingerprint", "read_stage", "remove_stages", "write_stage"]

ALGORITHM = 1  # raised where a change gives other results from the same recipe
_CODES = ".weight.codes"
_CUT_OFF = re.compile(r"\..+\.safetensors\.[0-9a-f]{32}\.tmp")  # by a kill in `write_stage`


def fingerprint(model: Any, about: dict[str, Any]) -> str:
    """SHA-256 (hex) of all that decides the results: weights, recipe and clips, and how."""
    told = about | {"algorithm": ALGORITHM}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_stage(
    path: Path,
    mark: str,
    weights: dict[str, QuantizedTensor],
    parameters: dict[str, Tensor],
    finer: dict[str, FinerRows],
) -> None:
    """Leave a finished stage at `path`, whole or not at all."""
    tensors = dict(parameters)
    tensors |= stored_finer(finer)
    for name, weight in weights.items():
        tensors |= {f"{name}.weight.{part}": value for part, value in weight.named_buffers()}
    write_tensors(path, tensors, {"fingerprint": mark})


def read_stage(path: Path, mark: str, model: Any, config: SAMLConfig) -> Found | None:
    """A stage that was finished before, by the same call; None where there is none."""
    try:
        tensors, about = read_tensors(path)
    except SAMLError:
        return None
    if about.get("fingerprint") != mark:
        return None
    weights, layers = {}, dict(model.named_modules())
    apart = split_finer(tensors)
    names = [k.removesuffix(_CODES) for k in tensors if k.endswith(_CODES)]
    for name in names:
        if name not in layers:
            return None
        weight = QuantizedTensor.empty(
            layers[name].weight.shape,
            config.format,
            config.block_size,
            config.double_quant,
        )
        parts = {part: tensors.pop(f"{name}.weight.{part}", None) for part in weight.state_dict()}
        if any(part is None for part in parts.values()):
            return None
        weight.load_state_dict(parts)
        weights[name] = weight
    known = {name: value.shape for name, value in model.named_parameters()}
    if any(known.get(name) != value.shape for name, value in tensors.items()):
        return None
    try:
        return weights, tensors, finer_of(apart, weights)
    except SAMLError:
        return None


def check_stages(folder: Path) -> None:
    """Refuse, before the work starts, a folder for stages that is somebody else's.

    Raises:
        SAMLError: it is a file, cannot be read, or holds anything but stages.
    """
    if not folder.exists():
        return
    try:
        foreign = next((path for path in sorted(folder.iterdir()) if not _is_ours(path)), None)
    except OSError as error:
        raise SAMLError(
            f"{folder}: expected a folder of calibrated layers: {error.strerror}; move it away"
        ) from error
    if foreign is not None:
        raise SAMLError(
            f"{folder}: holds {foreign.name}, expected calibrated layers alone, since they are "
            "deleted at the end; move the folder away, or write elsewhere"
        )


def remove_stages(folder: Path) -> None:
    """Delete the stages in a folder, and the folder if it is empty then."""
    with suppress(OSError):  # what stays is no harm
        for path in folder.iterdir():
            if _is_ours(path):
                path.unlink()
        folder.rmdir()


def _is_ours(path: Path) -> bool:
    """Whether `write_stage` wrote a file."""
    if _CUT_OFF.fullmatch(path.name):
        return path.is_file()
    try:
        return path.suffix == ".safetensors" and "fingerprint" in read_metadata(path)
    except SAMLError:
        return False
