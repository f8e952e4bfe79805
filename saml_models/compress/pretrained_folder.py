"""What `save_pretrained` writes of a model with low-bit weights: transformers' own folder.

`config.json` describes the layers under `quantization_config`, as `SAMLQuantizationConfig` reads
it. `model.safetensors` holds every tensor as it is in memory, experts in the dtype they are trained
in, so that a trainer's checkpoint loses nothing; `save_saml` writes smaller files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from saml_kernels.files import atomic_path, read_json
from saml_models.compress.layers import Compression, compression_of

__all__ = ["METHOD", "VERSION", "describe", "is_pretrained_folder", "save_pretrained"]

METHOD = "saml"  # transformers' `quant_method`

VERSION = 1

NOTE = "pip install saml-kernels, and import saml_models.hf before from_pretrained"

CONFIG, CARD = "config.json", "README.md"

_CARD = """\
---
library_name: transformers
tags:
- saml
---

# {kind} with low-bit weights and LoRA experts

Its layers are those of `saml-kernels`, which transformers has to know before it loads them:

```python
import saml_models.hf  # pip install saml-kernels
from {module} import {kind}

model = {kind}.from_pretrained("this folder")
```

Without that import transformers leaves the low-bit weights in the file, and the model gets random
ones.
"""


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    """transformers' own `save_pretrained`, of a model that `apply_saml` treated.

    A folder without a README.md gets one that says how to load the model.

    Args:
        model: its class writes it.
        save_directory, is_main_process, args, kwargs: as transformers takes them.

    Raises:
        SAMLError: the model speaks with a pruned profile, or with one of gates.
    """
    description = describe(compression_of(model))
    before = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = description
    try:
        type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
    finally:
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before
    card = Path(save_directory) / CARD
    if is_main_process and card.parent.is_dir() and not card.exists():
        root, _, _ = type(model).__module__.partition(".")
        module = root if root == "transformers" else type(model).__module__
        with atomic_path(card) as temporary:
            text = _CARD.format(kind=type(model).__name__, module=module)
            temporary.write_text(text, encoding="utf-8")


def describe(saml: Compression) -> dict[str, Any]:
    """`quantization_config` of a model as it is now, plain values for JSON.

    Raises:
        SAMLError: the model speaks with a pruned profile, or with one of gates.
    """
    saml.check_own_experts()
    calibrated = {} if saml.calibration is None else {"calibration": saml.calibration}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "saml": saml.config.to_dict(),
        "formats": saml.formats(),
        "short_windows": saml.short_windows,
        "margin": saml.margin,
        "weight_hash": saml.weight_hash(),
        "note": NOTE,
        **calibrated,
    }


def is_pretrained_folder(folder: Path) -> bool:
    """Whether `save_pretrained` wrote a folder of a model with low-bit weights."""
    if not (folder / CONFIG).is_file():
        return False
    config = read_json(folder / CONFIG).get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == METHOD
