"""The Conformer attention encoder-decoder: transformers' Canary, with a CTC head of our own.

FastConformer encoder (arXiv 2305.05084), Transformer decoder. A model whose configuration says
`ctc_head` has a linear CTC head on the encoder; NVIDIA's Canary checkpoints have none.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import CanaryProcessor

from saml_kernels.errors import SAMLError, one_line
from saml_models.models.conformer.model import Conformer
from saml_models.runtime.devices import on_device
from saml_models.runtime.quiet import check_complete, quiet_transformers

__all__ = ["is_conformer", "load_conformer"]

CONFIG = "config.json"


def is_conformer(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that holds a Canary, or a hub's id of one."""
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        return "canary" in path.name.lower()
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "canary"


def load_conformer(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Conformer, CanaryProcessor]:
    """Load a full-precision Conformer and its processor, ready for `model.generate`.

    Args:
        name_or_path: a folder in Hugging Face layout (safetensors only), or a Hugging Face id such
            as "nvidia/canary-180m-flash".
        device: where the model goes; None is the CPU.
        dtype: of the parameters; None is float32.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        SAMLError: the model cannot be found, is damaged, is a pickle, or is no Canary; or the
            device is not there.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    local = path.is_dir()
    if path.exists() and not is_conformer(path):
        raise SAMLError(f"{name}: holds no Canary; expected a folder with config.json and weights")
    place: Any = path if local else name
    try:
        with quiet_transformers():
            loaded: Any = Conformer.from_pretrained(
                place,
                dtype=dtype or torch.float32,
                use_safetensors=True,
                local_files_only=local,
                output_loading_info=True,
            )
            processor = CanaryProcessor.from_pretrained(place, local_files_only=local)
        model, about = loaded
    except Exception as error:  # transformers, the hub and safetensors raise a dozen kinds
        hint = "" if local else "; check the connection, or give the path of a folder"
        reason = one_line(error)
        raise SAMLError(f"{name}: cannot be loaded ({reason}){hint}") from error
    check_complete(name, about, "copy them again")
    model.config._name_or_path = name
    return on_device(model, device).eval(), processor
