"""Calibrated rounding that ships with the package, found by a model's own weights."""

from __future__ import annotations

from importlib.resources import as_file, files

from torch import nn

from saml_kernels import SAMLConfig
from saml_models.compress.apply import CompressionReport, apply_saml
from saml_models.compress.calibration import Calibration
from saml_models.compress.rounding_file import read_rounding

__all__ = ["compress", "shipped_rounding"]


def shipped_rounding(model: nn.Module, config: SAMLConfig) -> Calibration | None:
    """Calibrated rounding of this model in this format, whatever it was loaded by.

    Args:
        model: at full precision; a fine-tuned one is another model.
        config: of the layers.

    Returns:
        None where none ships.
    """
    folder = files("saml_models.shipped") / "rounding"
    resources = folder.iterdir() if folder.is_dir() else ()
    for resource in sorted(resources, key=lambda one: one.name):
        with as_file(resource) as path:
            found = read_rounding(path, model, config)
        if found is not None:
            return found
    return None


def compress(model: nn.Module, config: SAMLConfig) -> CompressionReport:
    """`apply_saml` with the rounding that ships for the model, plain rounding where none does.

    Args:
        model: at full precision; changed in place.
        config: of the layers. Experts beside calibrated weights start as a LoRA does.

    Raises:
        SAMLError: as `apply_saml`.
    """
    return apply_saml(model, config, calibration=shipped_rounding(model, config))
