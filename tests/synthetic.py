"""Small models with random weights, for tests that need the shape of a model but not its ears."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    CanaryProcessor,
    ParakeetFeatureExtractor,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from saml_models.base_training import FEATURES, Shape, train_tokenizer
from saml_models.conformer import Conformer

__all__ = ["small_conformer", "small_whisper"]


def small_whisper(seed: int = 0, layers: int = 1, vocabulary: int = 300) -> torch.nn.Module:
    """d = 64, one layer a side, weights large enough that experts and errors show in the logits."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=80,
        d_model=64,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=1500,
        max_target_positions=448,
        decoder_start_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.1,
    )
    return WhisperForConditionalGeneration(config).eval()


def small_conformer(seed: int = 0, vocabulary: int = 40, **shape: Any) -> tuple[Any, Any]:
    """A random Conformer with its processor: d = 64, two layers and one."""
    torch.manual_seed(seed)
    sizes = {"width": 64, "heads": 2, "encoder_layers": 2, "feed_forward": 128, **shape}
    model = Conformer(Shape(vocabulary=vocabulary, **sizes).config()).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # large enough that errors show in the logits
            torch.nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter[0].numel()))
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    text = ["the quick brown fox jumps over the lazy dog", "she sells sea shells"]
    processor = CanaryProcessor(
        ParakeetFeatureExtractor(**FEATURES), train_tokenizer(text, vocabulary)
    )
    return model, processor
