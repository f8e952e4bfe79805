"""A Conformer as a difference to a public Whisper: what comes back, how large, and damage."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import small_conformer_whisper, small_whisper

from saml_kernels import SAMLError
from saml_models.compress import difference as module
from saml_models.compress.difference import find_difference, read_difference, write_difference
from saml_models.compress.loading import load_model
from saml_models.models.interface import margin_of
from saml_models.models.whisper.conformer import ConformerWhisper, new_branches
from saml_models.runtime.tensors import read_tensors, write_tensors

NAME = "tiny.en"


@pytest.fixture(scope="module")
def whisper() -> Any:
    """Values as OpenAI released its own: float16's."""
    network = small_whisper()
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    return network


@pytest.fixture
def found(whisper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small Whisper stands for the one of that name."""
    monkeypatch.setattr(module, "load_whisper", lambda name: (copy.deepcopy(whisper), name))


@torch.no_grad()
def trained(model: Any) -> Any:
    """Its encoder as after some training."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.model.encoder.named_parameters():
        if "positions" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.02 * (parameter.std() + 0.1))
    return model


@pytest.fixture(scope="module")
def grown(whisper: Any) -> Any:
    loud = small_conformer_whisper()
    own = {"conv_kernel_size": 7, "half_step_ffn_dim": 96, "window_margin": 1.0}
    model = ConformerWhisper.grown_from(whisper, **own)
    with torch.no_grad():
        for name, parameter in new_branches(model).items():
            parameter.copy_(loud.get_parameter(name))
    return trained(model)


@pytest.mark.usefixtures("found")
def test_what_comes_back(whisper: Any, grown: Any, tmp_path: Path) -> None:
    path = tmp_path / "grown.safetensors"
    size = write_difference(path, grown, whisper, NAME)
    assert size == path.stat().st_size
    model, processor = read_difference(path)
    assert processor == NAME and not model.training and model.dtype == torch.float32
    assert model.config.conv_kernel_size == 7 and model.config.half_step_ffn_dim == 96
    assert margin_of(model) == 1.0
    public, new = dict(whisper.named_parameters()), new_branches(model)
    for name, value in model.named_parameters():
        wanted, error = grown.get_parameter(name), value - grown.get_parameter(name)
        if "positions" in name or ".encoder." not in name:
            assert torch.equal(value, public[name]), name
        elif value.dim() == 1 or ".depthwise." in name:
            assert torch.equal(value, wanted.half().float()), name
        elif name in new:
            assert error.norm() < 0.01 * wanted.norm(), name
        else:
            assert 0 < error.norm() < 0.15 * (wanted - public[name]).norm(), name
    write_difference(tmp_path / "again.safetensors", model, whisper, NAME)
    again, _ = read_difference(tmp_path / "again.safetensors")
    for name, value in again.named_parameters():  # what was stored once hardly moves
        torch.testing.assert_close(value, model.get_parameter(name), rtol=2e-2, atol=2e-3)


def test_tiny_en_s_takes_less_than_12_mb(tiny_en: Any, tmp_path: Path) -> None:
    model = ConformerWhisper.grown_from(tiny_en[0])
    with torch.no_grad():
        for parameter in new_branches(model).values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    path = tmp_path / "model.safetensors"
    assert write_difference(path, trained(model), tiny_en[0], NAME) < 12e6


@pytest.mark.usefixtures("found")
def test_found_by_its_name_or_path(
    whisper: Any, grown: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "conformers" / "conformer-tiny.en.safetensors"
    path.parent.mkdir()
    write_difference(path, grown, whisper, NAME)
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    models = [load_model(name)[0] for name in ("conformer-tiny.en", path)]
    assert models[0].config._name_or_path == "conformer-tiny.en"
    for name, value in models[0].named_parameters():
        assert torch.equal(value, models[1].get_parameter(name))
    assert find_difference("tiny.en") is None and find_difference(tmp_path) is None
    assert find_difference("../conformers/conformer-tiny.en") is None


@pytest.mark.usefixtures("found")
def test_damage_is_named(
    whisper: Any, grown: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grown.safetensors"
    write_difference(path, grown, whisper, NAME)
    tensors, metadata = read_tensors(path)
    branch = "model.encoder.layers.0.half_step.fc1.weight"
    own = "model.encoder.layers.0.fc1.weight.delta.absmax"

    def refused(match: str, changed: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        header = json.loads(metadata["saml"]) | (about or {})
        kept = {name: value for name, value in (tensors | changed).items() if value is not None}
        write_tensors(path, kept, {"saml": json.dumps(header)})
        with pytest.raises(SAMLError, match=match):
            read_difference(path)

    refused(f"{branch}: missing", {f"{branch}.int8": None})
    own_config = {"conv_kernel_size": 7, "half_step_ffn_dim": 96, "window_margin": 1.0}
    for match, config in (
        (f"{branch}: missing", own_config | {"half_step_ffn_dim": 60000}),
        ("half_step_ffn_dim", own_config | {"half_step_ffn_dim": 10**9}),
        ("window_margin", own_config | {"window_margin": 1e9}),
        ("copy the file", own_config | {"conv_kernel_size": "7"}),
        ("damaged description", {"d_model": 10**9}),
    ):
        refused(match, {}, {"config": config})
    refused("damaged description", {}, {"base": "../tiny.en"})
    refused("absmax", {own: tensors[own][:-1]})
    refused("NaN", {f"{branch}.scale": tensors[f"{branch}.scale"] * torch.nan})
    refused("not of this model", {"model.more": torch.zeros(2)})
    refused("does not match", {own: tensors[own] ^ 1})
    refused("another tiny.en", {}, {"base_sha256": "0" * 64})
    refused("version 9", {}, {"version": 9})
    refused("no difference", {}, {"kind": "saml-rounding"})


def test_what_has_no_difference(whisper: Any, grown: Any, tmp_path: Path) -> None:
    path = tmp_path / "grown.safetensors"
    with pytest.raises(SAMLError, match="ConformerWhisper at full precision"):
        write_difference(path, whisper, whisper, NAME)
    with pytest.raises(SAMLError, match="expected one of"):
        write_difference(path, grown, whisper, "my-whisper")
    with pytest.raises(SAMLError, match="that the model grew from"):
        write_difference(path, grown, small_whisper(layers=0), NAME)
    assert not path.exists()
