"""What a calibration found: weights for `apply_saml` to take in place of plainly rounded ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saml_kernels import QuantizedTensor, SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.layers.embedding import FinerRows
from saml_models.compress.layers import hash_of_weights

__all__ = ["Calibration", "check_calibration", "finer_of", "split_finer", "stored_finer"]

_FINER = ".finer."


@dataclass
class Calibration:
    """Rounded weights of one model in one format.

    Attributes:
        weights: by the name of the layer.
        finer: of some rows of a table, by the name of its layer.
        parameters: of what stays at full precision and was moved, by name: biases, positions.
        about: recipe, clips and their hash, for the model's description.
    """

    weights: dict[str, QuantizedTensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    finer: dict[str, FinerRows] = field(default_factory=dict)

    def hash(self) -> str:
        """SHA-256 (hex) of weights and finer rows."""
        parts = {f"{name}.finer": one.weight for name, one in self.finer.items()}
        rows = {name: one.rows for name, one in self.finer.items()}
        return hash_of_weights(self.weights | parts, rows)


def stored_finer(finer: Mapping[str, FinerRows]) -> dict[str, Tensor]:
    """Finer rows as tensors of a file, under `<table>.finer.` and the parts' names."""
    return {
        f"{name}{_FINER}{part}": value
        for name, rows in finer.items()
        for part, value in rows.state_dict().items()
    }


def split_finer(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Take what `stored_finer` made out of a file's tensors: parts by the table's name."""
    apart: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in tensors if _FINER in key]:
        name, _, part = key.partition(_FINER)
        apart.setdefault(name, {})[part] = tensors.pop(key)
    return apart


def finer_of(
    apart: Mapping[str, dict[str, Tensor]], tables: Mapping[str, QuantizedTensor]
) -> dict[str, FinerRows]:
    """Finer rows of tables, from what `split_finer` took.

    Raises:
        SAMLError: they do not fit their table.
    """
    finer = {}
    for name, parts in apart.items():
        try:
            finer[name] = FinerRows.empty(len(parts["rows"]), tables[name])
            finer[name].load_state_dict(parts)
            finer[name].check(tables[name], name)
        except (KeyError, SAMLError, TypeError, RuntimeError) as error:
            raise SAMLError(f"{name}: finer rows are damaged") from error
    return finer


def check_calibration(
    calibration: Calibration, model: nn.Module, places: Collection[str], config: SAMLConfig
) -> None:
    """Refuse a calibration of another model or format.

    Args:
        calibration: to be taken for `model`, which is at full precision.
        places: names of the layers that will be replaced.
        config: of their weights.

    Raises:
        SAMLError: names, shapes, formats or blocks differ, or a parameter holds NaN or infinity.
    """
    for name, weight in calibration.weights.items():
        if name not in places:
            raise SAMLError(f"{name}: calibrated, but no such layer; calibrate this model anew")
        shape: Any = model.get_submodule(name).weight.shape
        own = (weight.format, weight.block_size, weight.double_quant, weight.shape)
        asked = (config.format, config.block_size, config.double_quant, shape)
        if own != asked:
            raise SAMLError(
                f"{name}: calibrated as {_said(own)}; expected {_said(asked)}: calibrate anew"
            )
    for name, finer in calibration.finer.items():
        if name not in calibration.weights:
            raise SAMLError(f"{name}: finer rows of no table; calibrate this model anew")
        finer.check(calibration.weights[name], name)
    known = dict(model.named_parameters())
    for name, value in calibration.parameters.items():
        if name not in known or value.shape != known[name].shape:
            raise SAMLError(f"{name}: calibrated {tuple(value.shape)}; calibrate this model anew")
        if not torch.isfinite(value).all():
            raise SAMLError(f"{name}: the calibration holds NaN or infinity; calibrate anew")


def _said(kind: tuple[Any, ...]) -> str:
    format, block_size, double_quant, shape = kind
    scales = "with" if double_quant else "without"
    return f"{format}, blocks of {block_size} {scales} double quantisation, {tuple(shape)}"
