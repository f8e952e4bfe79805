"""Small Whispers with random weights whose experts say something: a voice for each seed."""

from __future__ import annotations

from typing import Any

import torch
from synthetic import small_whisper

from saml_kernels import SAMLConfig
from saml_models.compress.apply import apply_saml

CONFIG = SAMLConfig(num_experts=2, rank=2, expert_init="lora")


def make(seed: int = 0, config: SAMLConfig = CONFIG, voice: int | None = None) -> Any:
    model = small_whisper(seed)
    apply_saml(model, config)
    if voice is not None:
        speak_as(model, voice)
    return model


def speak_as(model: Any, voice: int) -> None:
    torch.manual_seed(voice)
    with torch.no_grad():
        for parameter in model.saml.experts().values():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
