"""Which kind of model a network is."""

from __future__ import annotations

from typing import Any

from saml_kernels.errors import SAMLError
from saml_models.models.interface import SpeechModel

__all__ = ["bind", "kind_named"]


def bind(network: Any, processor: Any) -> SpeechModel:
    """A network and its processor as one, by what its configuration says it is.

    Raises:
        SAMLError: it is of no kind known here.
    """
    config: Any = getattr(network, "config", None)
    if config is None and hasattr(processor, "asr_model"):  # ESPnet's `Speech2Text`
        return kind_named("espnet")(network, processor)
    return kind_named(getattr(config, "model_type", type(network).__name__))(network, processor)


def kind_named(model_type: Any) -> type[SpeechModel]:
    """The kind of transformers' `model_type`, or "espnet".

    Raises:
        SAMLError: it is none of those known here.
    """
    # The implementations import transformers' models, which nothing else here has to wait for.
    if model_type == "whisper":
        from saml_models.models.whisper.speech_model import WhisperSpeechModel

        return WhisperSpeechModel
    if model_type == "conformer_whisper":
        from saml_models.models.whisper.speech_model import ConformerWhisperSpeechModel

        return ConformerWhisperSpeechModel
    if model_type == "canary":
        from saml_models.models.conformer.speech_model import ConformerSpeechModel

        return ConformerSpeechModel
    if model_type == "espnet":
        from saml_models.models.espnet import EspnetSpeechModel

        return EspnetSpeechModel
    raise SAMLError(f"model type {model_type!r}: expected whisper, conformer_whisper or canary")
