"""How attention is computed while a model learns on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import WhisperForConditionalGeneration

__all__ = ["attention_as_products"]


@contextmanager
def attention_as_products(model: nn.Module, precision: str) -> Iterator[None]:
    """Within the block a Whisper's attention on a CPU is two products and a softmax, in bfloat16.

    PyTorch's fused kernel for CPUs takes 1.7 times as long, forward and backward, where the
    processor multiplies bfloat16; it is faster in float32. The scores of a layer stay in memory
    until they were used: 27 MB for six heads and 30 s.
    """
    whisper: Any = model
    on_cpu = next(model.parameters()).device.type == "cpu"
    known = isinstance(model, WhisperForConditionalGeneration)
    if not known or not on_cpu or precision != "bf16":
        yield
        return
    own = whisper.config._attn_implementation
    whisper.set_attn_implementation("eager")
    try:
        yield
    finally:
        whisper.set_attn_implementation(own)
