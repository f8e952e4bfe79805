"""CTranslate2's Whisper (`model.bin`) -> transformers' Whisper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
from saml_kernels.files import read_json, require
from saml_models.models.whisper.ctranslate2 import CTranslate2Whisper, Dimensions
from saml_models.models.whisper.tokenizer import (
    _END,
    _ENGLISH_VOCABULARY,
    _FIRST_MULTILINGUAL_VOCABULARY,
    _is_ints,
    build_tokenizer,
)


def load_ctranslate2(
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
    words = build_tokenizer(tokenizer, sizes.vocab_size)
    generation = _generation_config(words, read_json(config), config, sizes)
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
        require(_is_ints(values, sizes.vocab_size), path, f"{key} as a list of token ids")
        return list(values)

    vocabulary = tokenizer.get_vocab()

    heads = stored.get("alignment_heads")
    if heads is None:  # as CTranslate2 does: the upper half of the decoder
        layers = range(sizes.decoder_layers // 2, sizes.decoder_layers)
        heads = [[layer, head] for layer in layers for head in range(sizes.heads)]
    require(
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
