"""What tests of `bench gpu` share: a step's setting, and a small model's folder."""

import time

import pytest
import torch
from synthetic import small_whisper

from bench.gpu import check
from saml_kernels import SAMLConfig
from saml_models.compress.apply import apply_saml
from saml_models.compress.checkpoint import save_saml

CPU = torch.device("cpu")


@pytest.fixture
def small(tmp_path):
    """A step's setting on the CPU."""
    until = time.monotonic() + 500
    return check.Setting(CPU, tmp_path / "results", until, True, False, None, None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tiny_en):
    """What `saml quantize` writes, of a Whisper with d = 64 and random weights."""
    whole, processor = tiny_en
    model = small_whisper(vocabulary=whole.config.vocab_size)
    model.generation_config = whole.generation_config
    for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(whole.config, name))
    apply_saml(model, SAMLConfig(expert_init="lora"))
    folder = tmp_path_factory.mktemp("model")
    save_saml(model, processor, folder)
    return folder
