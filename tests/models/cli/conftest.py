"""Two clips of one reader, a model small enough to train in a second, and a profile."""

import json
from copy import deepcopy

import pytest
from command_line import saml

from saml_kernels import SAMLConfig
from saml_models.compress.checkpoint import save_saml
from saml_models.compress.shipped_rounding import compress
from saml_models.data.corpora import load_corpus


@pytest.fixture(scope="session")
def clips(speech_root):
    """The two shortest utterances of one reader."""
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])
    return sorted(found, key=lambda u: len(u.load()))[:2]


@pytest.fixture(scope="session")
def manifest(clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "voice.jsonl"
    rows = [{"audio": str(u.audio), "text": u.text, "speaker": "ann"} for u in clips]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def model(tiny_en, tmp_path_factory):
    """A saved SAML model, small enough to train in a second."""
    network = deepcopy(tiny_en[0])
    compress(network, SAMLConfig(num_experts=2, rank=2, expert_init="lora"))
    folder = tmp_path_factory.mktemp("model")
    save_saml(network, tiny_en[1], folder)
    return folder


@pytest.fixture(scope="session")
def profile(model, manifest, tmp_path_factory):
    """What `saml adapt` writes."""
    out = tmp_path_factory.mktemp("profiles") / "ann.safetensors"
    result = saml("adapt", "--model", model, "--data", manifest, "--out", out, "--epochs", 1)
    assert result.exit_code == 0, (result.output, result.exception)
    assert [p.name for p in out.parent.iterdir()] == ["ann.safetensors"]
    assert "learnt ann from 2 utterances" in result.stdout
    assert f"written: {out} ({out.stat().st_size:,} bytes" in result.stdout
    return out
