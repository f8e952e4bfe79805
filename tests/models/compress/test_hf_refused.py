"""What `saml_models.hf` does not load or save: hostile and damaged folders, pickles, parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import load, make, one_line
from safetensors.torch import load_file, save_file
from synthetic import small_whisper
from torch import Tensor
from transformers import WhisperForConditionalGeneration, WhisperModel

from saml_kernels import SAMLConfig, quantize
from saml_kernels.layers.embedding import FinerRows
from saml_models.compress.apply import apply_saml
from saml_models.compress.calibration import Calibration
from saml_models.compress.loading import load_model


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def described(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda c: c["quantization_config"].update(values))


def layered(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda c: c["quantization_config"]["saml"].update(values))


def stored(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return act


CODES = "model.encoder.layers.0.fc1.weight.codes"
NORM = "model.encoder.layer_norm.weight"

HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "newer": (described(version=2), "upgrade"),
    "no version": (described(version="1"), "version '1'"),
    "unknown key": (described(surprise=1), "surprise"),
    "margin": (described(margin=float("nan")), "margin"),
    "no layers": (described(saml=3), "saml=3"),
    "short_windows": (described(short_windows="yes"), "short_windows"),
    "hash": (described(weight_hash=5), "weight_hash"),
    "other weights": (described(weight_hash="0" * 64), "weight_hash"),
    "unknown format": (layered(format="nf3"), "nf3"),
    "another format": (layered(format="int8"), "codes"),
    "another block": (layered(block_size=32), "absmax"),
    "experts without end": (layered(num_experts=10**12), "more than"),
    "rank without end": (layered(rank=10**12), "more than"),
    "more experts": (layered(num_experts=3), "lora_a"),
    "another router": (layered(router="speaker"), "router"),
    "vocabulary": (lambda f: edit(f, lambda c: c.update(vocab_size=10**9)), "embed_tokens"),
    "codes missing": (stored(lambda t: t.pop(CODES)), CODES),
    "norm missing": (stored(lambda t: t.pop(NORM)), NORM),
    "codes changed": (stored(lambda t: t[CODES].add_(1)), "weight_hash"),
    "codes as floats": (stored(lambda t: t.update({CODES: t[CODES].float()})), CODES),
    "NaN": (stored(lambda t: t[NORM].fill_(float("nan"))), NORM),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_or_hostile_folder_is_one_line(harm: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    act, word = HARMS[harm]
    act(tmp_path / "m")
    one_line(lambda: load(tmp_path / "m"), word)
    one_line(lambda: load_model(tmp_path / "m"))


def test_finer_rows_that_fall_or_are_of_no_table(tmp_path: Path) -> None:
    path = "model.decoder.embed_tokens"
    plain: Any = make()
    weights = {name.removesuffix(".weight"): one for name, one in plain.saml.weights.items()}
    more = quantize(torch.randn(2, weights[path].shape[1]))
    finer = FinerRows(torch.tensor([0, 5], dtype=torch.int32), more)
    model: Any = small_whisper()
    config = SAMLConfig(num_experts=2, rank=2)
    apply_saml(model, config, calibration=Calibration(weights, finer={path: finer}))
    model.save_pretrained(tmp_path)
    assert load(tmp_path).saml.weight_hash() == model.saml.weight_hash()
    for rows in ([5, 0], [0, 99999]):
        stored(lambda t: t[f"{path}.finer.rows"].copy_(torch.tensor(rows)))(tmp_path)  # noqa: B023
        one_line(lambda: load(tmp_path), path, "rising rows")


def test_layers_without_end_are_refused_unbuilt(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    edit(tmp_path / "m", lambda c: c.update(encoder_layers=10**9))
    one_line(lambda: load_model(tmp_path / "m"), "config.json", "more weights")
    edit(tmp_path / "m", lambda c: c.update(encoder_layers="many"))
    one_line(lambda: load_model(tmp_path / "m"), "config.json")


def test_no_pickle_is_opened(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "m" / "pytorch_model.bin")
    one_line(lambda: load(tmp_path / "m", use_safetensors=False), "pytorch_model.bin")
    one_line(lambda: load_model(tmp_path / "m"), "pickle")


def test_a_part_of_the_saved_model_is_one_line(folder: Path) -> None:
    one_line(lambda: WhisperModel.from_pretrained(folder), "WhisperForConditionalGeneration")


def test_what_no_folder_can_hold_is_one_line(tmp_path: Path) -> None:
    model = make()
    for router in model.saml.routers.values():
        router.offset = torch.ones(2)
    one_line(lambda: model.save_pretrained(tmp_path / "m"), "gates")
    model = make()
    layer = next(iter(model.saml.layers.values()))
    layer.lora_a.data = layer.lora_a.data[:1]
    one_line(lambda: model.save_pretrained(tmp_path / "m"), "pruned")
    assert not (tmp_path / "m").exists()
    assert isinstance(model, WhisperForConditionalGeneration)
