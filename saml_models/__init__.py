"""Whisper and the Conformer at a seventh of their size, and experts that learn a voice.

    import saml_models as saml

    model = saml.load("tiny.en")
    me = model.adapt("my_clips/")
    print(model.transcribe("talk.wav", speaker=me).text)

Everything is imported when it is first asked for (PEP 562): `import saml_models` alone brings
neither torch nor transformers. What the package needs comes with
`pip install 'saml-kernels[whisper]'`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saml_models.compress.apply import apply_saml
    from saml_models.evaluation.protocol import evaluate
    from saml_models.models.conformer.loading import load_conformer
    from saml_models.models.whisper.loading import load_whisper
    from saml_models.recogniser import Recogniser, load
    from saml_models.speakers.profile import SpeakerProfile
    from saml_models.training.adapt import adapt
    from saml_models.transcription.recordings import transcribe

__all__ = [
    "Recogniser",
    "SpeakerProfile",
    "adapt",
    "apply_saml",
    "evaluate",
    "load",
    "load_conformer",
    "load_whisper",
    "transcribe",
]

_MODULES = {
    "Recogniser": "recogniser",
    "SpeakerProfile": "speakers.profile",
    "adapt": "training.adapt",
    "apply_saml": "compress.apply",
    "evaluate": "evaluation.protocol",
    "load": "recogniser",
    "load_conformer": "models.conformer.loading",
    "load_whisper": "models.whisper.loading",
    "transcribe": "transcription.recordings",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that holds it (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from saml_kernels.errors import needs

    with needs(f"{__name__}.{name}", "whisper"):
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
