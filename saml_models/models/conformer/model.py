"""The Conformer attention encoder-decoder: transformers' Canary, with a CTC head of our own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import CanaryConfig, CanaryForConditionalGeneration

__all__ = ["Conformer"]


class Conformer(CanaryForConditionalGeneration):
    """Canary; where `config.ctc_head` says so, with `ctc_head`: encoder frames -> logits [V].

    The CTC head's blank is the padding token.
    """

    def __init__(self, config: CanaryConfig) -> None:
        super().__init__(config)
        if getattr(config, "ctc_head", False):
            encoder: Any = config.encoder_config
            self.ctc_head = nn.Linear(encoder.hidden_size, config.vocab_size)
            self.post_init()
