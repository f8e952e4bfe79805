"""Calibrated rounding as differences from the nearest codes: the same bits back, or an error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import small_whisper
from torch._subclasses.fake_tensor import FakeTensorMode

from saml_kernels import SAMLConfig, SAMLError, quantize
from saml_kernels.layers.embedding import FinerRows
from saml_models.compress import shipped_rounding as shipped_module
from saml_models.compress.apply import apply_saml
from saml_models.compress.calibration import Calibration
from saml_models.compress.layers import quantised_tensors
from saml_models.compress.rounding_file import _original, read_rounding, write_rounding
from saml_models.compress.shipped_rounding import compress, shipped_rounding
from saml_models.models.whisper.loading import load_whisper
from saml_models.models.whisper.wheels import find_model
from saml_models.runtime.tensors import read_tensors, write_tensors


@pytest.fixture(scope="module")
def model() -> Any:
    network = small_whisper(layers=1, vocabulary=5000).eval()
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    return network


def calibrated(model: Any, config: SAMLConfig) -> Calibration:
    """Rounding of other weights than the model's: noise, and a shift of the embedding's columns."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d) and name != "proj_out":
            weight = module.weight.detach()
            noise = torch.randn(weight.shape, generator=generator) * weight.std() * 0.1
            weights[name] = quantize(
                weight + noise, config.format, config.block_size, config.double_quant
            )
    table = model.model.decoder.embed_tokens.weight.detach()
    shift = torch.rand(table.shape[1], generator=generator)
    weights["model.decoder.embed_tokens"] = quantize(
        table + shift, config.format, config.block_size, config.double_quant
    )
    bias = model.model.encoder.conv1.bias.detach() + 1
    rows = torch.tensor([2, 700, 4999], dtype=torch.int32)
    more = torch.randn((3, table.shape[1]), generator=generator)
    kind = config.format, config.block_size, config.double_quant
    return Calibration(
        weights,
        {"model.encoder.conv1.bias": bias.half().float()},
        {"clips": 3},
        {"model.decoder.embed_tokens": FinerRows(rows, quantize(more, *kind))},
    )


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_same_bits_come_back(
    model: Any, tmp_path: Path, format: Any, double_quant: bool
) -> None:
    config = SAMLConfig(num_experts=0, format=format, double_quant=double_quant)
    made = calibrated(model, config)
    write_rounding(tmp_path / "rounding.safetensors", made, model)
    found = read_rounding(tmp_path / "rounding.safetensors", model, config)
    assert found is not None and found.about == {"clips": 3}
    assert set(found.weights) == set(made.weights)
    for name, weight in made.weights.items():
        assert torch.equal(found.weights[name].codes, weight.codes), name
        assert torch.equal(found.weights[name].absmax, weight.absmax), name
    (finer,), (wanted,) = found.finer.values(), made.finer.values()
    for part, value in wanted.state_dict().items():
        assert torch.equal(finer.state_dict()[part], value), part
    (bias,) = found.parameters.values()
    assert torch.equal(bias, made.parameters["model.encoder.conv1.bias"])


def test_it_is_smaller_than_the_codes(model: Any, tmp_path: Path) -> None:
    made = calibrated(model, SAMLConfig(num_experts=0))
    size = write_rounding(tmp_path / "rounding.safetensors", made, model)
    assert size < 0.6 * sum(weight.nbytes for weight in made.weights.values())


def test_another_model_or_format_has_none(model: Any, tmp_path: Path) -> None:
    config = SAMLConfig(num_experts=0)
    path = tmp_path / "rounding.safetensors"
    write_rounding(path, calibrated(model, config), model)
    assert read_rounding(path, model, SAMLConfig(num_experts=0, format="fp4")) is None
    assert read_rounding(path, model, SAMLConfig(num_experts=0, block_size=128)) is None
    tuned = copy.deepcopy(model)
    tuned.model.encoder.layer_norm.bias.data[0] += 1
    assert read_rounding(path, tuned, config) is None
    assert read_rounding(path, small_whisper(layers=2, vocabulary=5000), config) is None


def test_damage_is_named(model: Any, tmp_path: Path) -> None:
    config = SAMLConfig(num_experts=0)
    path = tmp_path / "rounding.safetensors"
    write_rounding(path, calibrated(model, config), model)
    tensors, metadata = read_tensors(path)
    name = "model.encoder.conv1"

    def refused(match: str, changed: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        header = json.loads(metadata["saml"]) | (about or {})
        write_tensors(path, tensors | changed, {"saml": json.dumps(header)})
        with pytest.raises(SAMLError, match=match):
            read_rounding(path, model, config)

    codes = tensors[f"{name}.codes"]
    refused(f"{name} is damaged", {f"{name}.codes": codes[:-5]})
    refused(f"{name} is damaged", {f"{name}.codes": codes.float()})
    refused(f"{name} is damaged", {f"{name}.offset": torch.zeros(3)})
    finer = "model.decoder.embed_tokens.finer."
    reason = "embed_tokens: finer rows are damaged"
    refused(reason, {f"{finer}rows": torch.tensor([2, 700, 5000], dtype=torch.int32)})
    refused(reason, {f"{finer}weight.codes": tensors[f"{finer}weight.codes"][:-1]})
    row = torch.tensor([1], dtype=torch.int32)
    refused("conv1: finer rows are damaged", {f"{name}.finer.rows": row})
    # More bytes than the weight has: a stream that would fill the memory is cut off.
    refused(
        f"{name} is damaged", {f"{name}.codes": tensors["model.decoder.embed_tokens.codes"].clone()}
    )
    refused("does not match", {}, {"weight_hash": "0" * 64})
    refused("does not match", {}, {"tensors_sha256": "0" * 64})
    scales = f"{finer}weight.nested_absmax"  # no part of the weights' own hash
    refused("does not match", {scales: tensors[scales] * 2})
    bias = f"{name}.bias"
    refused("does not match", {bias: tensors[bias] + 1})
    refused("version 9", {}, {"version": 9})
    refused("no rounding", {}, {"kind": "saml-speaker-profile"})


def test_a_model_on_another_device(model: Any, tmp_path: Path) -> None:
    """A CUDA one is read on the CPU, and what a calibration found goes where the model is."""
    config = SAMLConfig(num_experts=0)
    made = calibrated(model, config)
    with FakeTensorMode():
        elsewhere = torch.nn.Embedding(2, 3, _weight=torch.empty(2, 3, device="cuda"))
        assert elsewhere.weight.is_cuda
        assert _original(torch.nn.Sequential(elsewhere), "0").device.type == "cpu"
    network = copy.deepcopy(model).to("meta")
    apply_saml(network, config, calibration=made)
    assert all(
        buffer.is_meta for one in quantised_tensors(network).values() for buffer in one.buffers()
    )
    assert network.model.decoder.embed_tokens.finer.rows.is_meta
    assert not any(b.is_meta for one in made.weights.values() for b in one.buffers())
    assert not made.finer["model.decoder.embed_tokens"].rows.is_meta


def test_what_ships_is_taken_by_the_weights(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SAMLConfig(num_experts=0)
    made = calibrated(model, config)
    (tmp_path / "rounding").mkdir()
    write_rounding(tmp_path / "rounding" / "small.safetensors", made, model)
    monkeypatch.setattr(shipped_module, "files", lambda package: tmp_path)
    network = copy.deepcopy(model)
    compress(network, config)
    assert network.saml.calibration == {"clips": 3}
    parts = made.weights | {f"{name}.finer": one.weight for name, one in made.finer.items()}
    for name, weight in quantised_tensors(network).items():
        expected = parts[name.removesuffix(".weight")]
        assert torch.equal(weight.codes, expected.codes), name
    other = small_whisper(layers=2, vocabulary=5000)
    compress(other, config)
    assert other.saml.calibration is None


def test_tiny_en_has_one(tiny_en: Any) -> None:
    found = shipped_rounding(tiny_en[0], SAMLConfig())
    assert found is not None
    assert found.about["clips"] == 160
    assert len(found.weights) == 67


def test_base_has_one() -> None:
    if find_model("base") is None:
        pytest.skip("no Whisper base on this machine")
    found = shipped_rounding(load_whisper("base")[0], SAMLConfig())
    assert found is not None
    assert found.about["clips"] == 160
    assert len(found.weights) == 99
