"""Which kind of model a network is."""

from __future__ import annotations

from typing import Any

from torch import nn

from saml_kernels.errors import SAMLError
from saml_models.models.interface import Family

__all__ = ["family_named", "family_of"]


def family_of(model: nn.Module) -> Family:
    """The family of a model, by its configuration.

    Raises:
        SAMLError: it is of no family known here.
    """
    own = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return family_named(getattr(model, "saml_family", own))


def family_named(model_type: Any) -> Family:
    """The family of transformers' `model_type`.

    Raises:
        SAMLError: it is none of those known here.
    """
    # The implementations import transformers' models, which nothing else here has to wait for.
    if model_type == "whisper":
        from saml_models.models.whisper.family import WhisperFamily

        return WhisperFamily()
    if model_type == "canary":
        from saml_models.models.conformer.family import ConformerFamily

        return ConformerFamily()
    if model_type == "espnet":
        from saml_models.models.espnet import EspnetFamily

        return EspnetFamily()
    raise SAMLError(f"model type {model_type!r}: expected whisper or canary")
