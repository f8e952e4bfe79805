"""Small Whispers with random weights, for tests that need the shape of a model but not its ears."""

from __future__ import annotations

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

__all__ = ["small_whisper"]


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
