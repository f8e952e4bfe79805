"""Small models as `saml_models.hf` saves them, and what its refusals look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from synthetic import small_conformer, small_whisper
from transformers import AutoModelForSpeechSeq2Seq

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml

load = AutoModelForSpeechSeq2Seq.from_pretrained


@torch.no_grad()
def experts_of(model: Any, seed: int = 3) -> Any:
    """The model with random experts, of values that neither float16 nor int8 can hold."""
    torch.manual_seed(seed)
    for parameter in model.saml.experts().values():
        parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


def make(family: str = "whisper", seed: int = 3, **settings: Any) -> Any:
    model: Any = small_whisper() if family == "whisper" else small_conformer()[0]
    apply_saml(model, SAMLConfig(**{"num_experts": 2, "rank": 2, **settings}))
    return experts_of(model, seed)


def one_line(act: Callable[[], Any], *words: str) -> None:
    with pytest.raises(SAMLError) as caught:
        act()
    (line,) = str(caught.value).splitlines()
    assert all(word in line for word in words), line
