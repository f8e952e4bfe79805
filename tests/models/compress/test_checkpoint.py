"""Saving and loading: the same logits bit for bit, the size, and hostile files."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import small_whisper
from torch import Tensor

from saml_kernels import SAMLConfig, SAMLError, quantize
from saml_kernels.layers.embedding import FinerRows
from saml_models.compress import checkpoint as storage
from saml_models.compress.apply import apply_saml
from saml_models.compress.calibration import Calibration
from saml_models.compress.checkpoint import load_saml, save_saml
from saml_models.compress.layers import quantised_tensors
from saml_models.compress.loading import load_model
from saml_models.compress.packing import pack_experts, unpack_expert
from saml_models.models.interface import QUANTISED_MARGIN
from saml_models.models.whisper.windows import clip_window
from saml_models.speakers.profile import SpeakerProfile

IDS = torch.tensor([[1, 5, 9, 7]])
MEL = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))


def trained(model: Any) -> Any:
    """Experts moved off their starting point by something that int8 cannot hold exactly."""
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in model.saml.experts().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_features=MEL, decoder_input_ids=IDS).logits


@pytest.fixture(scope="module")
def processor(tiny_en: Any) -> Any:
    return tiny_en[1]


@pytest.fixture(scope="module")
def folder(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small saved model; tests copy it before they damage it."""
    model = small_whisper()
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    path = tmp_path_factory.mktemp("saved") / "model"
    save_saml(trained(model), processor, path)
    return path


@pytest.mark.parametrize("expert_format", ["int8", "float16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "utterance", "top_k": 1, "format": "fp4", "double_quant": False},
        {"router": "speaker", "mix": "merged", "format": "int8", "block_size": 128},
        {"router": "shared", "mix": "merged", "targets": "attention", "format": "int4"},
        {"num_experts": 0},
    ],
)
def test_logits_come_back_bit_for_bit(
    settings: dict[str, Any], expert_format: Any, processor: Any, tmp_path: Path
) -> None:
    model = small_whisper()
    base = {"num_experts": 2, "rank": 2}
    config = SAMLConfig(**{**base, **settings}, expert_format=expert_format)
    apply_saml(model, config)
    trained(model)
    model.saml.short_windows = True
    size = save_saml(model, processor, tmp_path / "m")
    expected = logits(model)
    again, words = load_saml(tmp_path / "m")
    assert torch.equal(logits(again), expected)
    assert again.saml.config == config
    assert again.saml.short_windows is True
    assert not again.training
    assert words.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    files = [tmp_path / "m" / name for name in ("model.safetensors", "saml.json")]
    assert size == sum(f.stat().st_size for f in files)
    trainable = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trainable == set(model.saml.experts())


def test_a_newer_file_is_refused(processor: Any, tmp_path: Path) -> None:
    model = small_whisper()
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    save_saml(model, processor, tmp_path)
    path = tmp_path / "saml.json"
    written = json.loads(path.read_text())
    assert written["saml_version"] == 1
    for version, reason in [(4, "of a newer saml-kernels; .* upgrade"), ("1", "expected a number")]:
        # What newer files call their settings is not known here.
        path.write_text(json.dumps({"saml_version": version, "model": written["model"]}))
        with pytest.raises(SAMLError, match=reason):
            load_saml(tmp_path)


def test_layers_with_formats_of_their_own(processor: Any, tmp_path: Path) -> None:
    formats = {
        "model.decoder.embed_tokens": "int8",
        "model.encoder.conv1": "fp4",
        "model.encoder.layers.0.fc1": "int8",
    }
    model: Any = small_whisper()
    apply_saml(model, SAMLConfig(num_experts=2, rank=2), formats=formats)
    assert model.saml.formats() == formats
    assert model.model.encoder.layers[0].fc1.weight.codes.dtype == torch.int8
    save_saml(trained(model), processor, tmp_path)
    path = tmp_path / "saml.json"
    written = json.loads(path.read_text())
    assert written["saml_version"] == 2 and written["formats"] == formats
    again: Any = load_saml(tmp_path)[0]
    assert again.saml.formats() == formats and again.saml.weight_hash() == model.saml.weight_hash()
    features, ids = torch.randn(1, 80, 3000), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        ours, theirs = (m(features, decoder_input_ids=ids).logits for m in (model, again))
    assert torch.equal(ours, theirs)
    rows = [{"rows": 100, "format": "int8"}, {"rows": 200, "format": "nf4"}]
    for bad, reason in (
        ({"model.decoder.embed_tokens": rows}, "rows are in several formats, .* upgrade"),
        ({"model.nothing": "int8"}, "model.nothing: no layer"),
        ({"model.encoder.conv1": "int3"}, "model.encoder.conv1: format"),
        ({"model.encoder.conv1": 4}, "model.encoder.conv1: "),
    ):
        path.write_text(json.dumps(written | {"formats": bad}))
        with pytest.raises(SAMLError, match=reason):
            load_saml(tmp_path)


def finer(model: Any) -> FinerRows:
    """More bits for three rows of a small model's table."""
    table = model.model.decoder.embed_tokens.weight
    more = torch.randn(3, table.shape[1], generator=torch.Generator().manual_seed(4))
    return FinerRows(torch.tensor([0, 5, 9], dtype=torch.int32), quantize(more))


def test_finer_rows_of_a_table(processor: Any, tmp_path: Path) -> None:
    path, model = "model.decoder.embed_tokens", small_whisper()
    coarse = copy.deepcopy(model)
    config = SAMLConfig(num_experts=2, rank=2)
    apply_saml(coarse, config)
    weights = {name.removesuffix(".weight"): w for name, w in quantised_tensors(coarse).items()}
    apply_saml(model, config, calibration=Calibration(weights, finer={path: finer(coarse)}))
    assert not torch.equal(logits(model), logits(coarse))
    assert model.saml.formats() == {path: {"format": "nf4", "finer_rows": 3}}
    assert model.saml.weight_hash() != coarse.saml.weight_hash()
    save_saml(trained(model), processor, tmp_path)
    written = json.loads((tmp_path / "saml.json").read_text())
    assert written["saml_version"] == 3
    again: Any = load_saml(tmp_path)[0]
    assert torch.equal(logits(again), logits(model))
    assert again.saml.weight_hash() == model.saml.weight_hash()

    def refused(rows: Any, reason: str, **others: Any) -> None:
        formats = {path: {"format": "nf4", "finer_rows": rows}} | others
        (tmp_path / "saml.json").write_text(json.dumps(written | {"formats": formats}))
        with pytest.raises(SAMLError, match=reason):
            load_saml(tmp_path)

    refused(2, r"finer.* has shape")
    refused(10**9, r"finer rows: 1000000000; expected 1 to")
    refused("3", r"finer rows: '3'; expected 1 to")
    layer = {"model.encoder.conv1": {"format": "nf4", "finer_rows": 3}}
    refused(3, "conv1: finer rows come from a calibration, or from a file", **layer)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{path}.finer.rows"][1] = 99999
    save_file(tensors, tmp_path / "model.safetensors")
    refused(3, r"embed_tokens: 3 rows .* expected rising rows .* the file is damaged")
    with pytest.raises(SAMLError, match="finer rows come from a calibration"):
        apply_saml(small_whisper(), config, formats=model.saml.formats())


def test_what_no_folder_can_hold_is_refused_before_anything_is_written(
    processor: Any, tmp_path: Path
) -> None:
    def refused(model: Any, reason: str) -> None:
        before = {n: p.clone() for n, p in model.saml.experts().items()}
        with pytest.raises(SAMLError, match=reason):
            save_saml(model, processor, tmp_path / "m")
        assert not (tmp_path / "m").exists()
        assert all(torch.equal(p, before[n]) for n, p in model.saml.experts().items())

    model: Any = small_whisper()
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    with SpeakerProfile.of_gates(model).applied(model):
        refused(model, "a profile of gates.* save the profile")
    layer = next(iter(model.saml.layers.values()))
    layer.lora_a.data = layer.lora_a.data[:1]
    refused(model, "a pruned profile")


def test_a_compiled_model_comes_back_bit_for_bit(processor: Any, tmp_path: Path) -> None:
    model: Any = small_whisper()
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    save_saml(torch.compile(trained(model)), processor, tmp_path)
    assert torch.equal(logits(load_saml(tmp_path)[0]), logits(model))


@pytest.mark.parametrize("save", [save_saml, "save_pretrained"])
@pytest.mark.parametrize("margin", [None, 2.5, QUANTISED_MARGIN])
def test_the_window_of_a_clip_comes_back(
    save: Any, margin: float | None, processor: Any, tmp_path: Path
) -> None:
    model: Any = small_whisper()
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    model.saml.margin = margin
    if save is save_saml:
        save_saml(model, processor, tmp_path)
    else:
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    again, words = load_model(tmp_path)
    assert clip_window(again, 4 * 16000) == clip_window(model, 4 * 16000)
    assert again.saml.margin == margin
    assert words.tokenizer.normalize("The colour") == "the color"


def test_margins_of_a_description(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "copy")) / "saml.json"
    written = json.loads(path.read_text())
    del written["margin"]  # of an earlier version
    path.write_text(json.dumps(written))
    assert load_model(path.parent)[0].saml.margin == QUANTISED_MARGIN
    for bad in (-1, float("nan"), float("inf"), 10**400, "10", True):
        path.write_text(json.dumps(written | {"margin": bad}))
        with pytest.raises(SAMLError, match=r"margin=.*expected seconds or null"):
            load_model(path.parent)


@pytest.mark.parametrize("router", ["token", "shared"])
def test_loading_fills_all_memory(
    router: Any, poisoned: None, processor: Any, tmp_path: Path
) -> None:
    """No tensor of a loaded model is what happened to lie in its memory, here NaN."""
    mix = "merged" if router == "shared" else "sum"
    model = small_whisper()
    apply_saml(model, SAMLConfig(num_experts=2, rank=2, router=router, mix=mix))
    save_saml(trained(model), processor, tmp_path / "m")
    again, _ = load_saml(tmp_path / "m")
    for name, tensor in [*again.named_parameters(), *again.named_buffers()]:
        assert torch.isfinite(tensor.float()).all(), name
    assert torch.equal(logits(again), logits(model))


def test_a_folder_that_transformers_wrote_of_a_quantised_model(
    processor: Any, tmp_path: Path
) -> None:
    model: Any = small_whisper()
    save = type(model).save_pretrained
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    save(model, tmp_path)  # as it was done before it was refused
    processor.save_pretrained(tmp_path)
    with pytest.raises(SAMLError, match=r"low-bit weights.*save_saml") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_saving_again_changes_nothing(folder: Path, processor: Any, tmp_path: Path) -> None:
    model, _ = load_saml(folder)
    save_saml(model, processor, tmp_path / "again")
    for name in ("model.safetensors", "saml.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_tiny_en_is_seven_times_smaller(tiny_en: Any, tmp_path: Path, record_property: Any) -> None:
    model, processor = copy.deepcopy(tiny_en[0]), tiny_en[1]
    report = apply_saml(model, SAMLConfig(num_experts=4, rank=4))
    size = save_saml(model, processor, tmp_path)
    ratio = report.full_bytes / size
    record_property("ratio", ratio)
    print(f"tiny.en: {report.full_bytes} / {size} = {ratio:.3f}")
    assert ratio >= 7.0
    expected = logits(model)
    again, _ = load_saml(tmp_path)
    assert torch.equal(logits(again), expected)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert not [n for n in load_file(tmp_path / "model.safetensors") if "encoder.embed_pos" in n]


@pytest.mark.slow
def test_base_is_seven_times_smaller(tmp_path: Path) -> None:
    from saml_models.models.whisper.loading import load_whisper

    try:
        model, processor = load_whisper("base")
    except SAMLError as error:
        pytest.skip(str(error))
    report = apply_saml(model, SAMLConfig(num_experts=4, rank=4))
    size = save_saml(model, processor, tmp_path)
    print(f"base: {report.full_bytes} / {size} = {report.full_bytes / size:.3f}")
    assert report.full_bytes / size >= 7.0
    expected = logits(model)
    assert torch.equal(logits(load_saml(tmp_path)[0]), expected)


def test_learnt_encoder_positions_are_stored(processor: Any, tmp_path: Path) -> None:
    model = small_whisper()
    with torch.no_grad():
        model.model.encoder.embed_positions.weight[7, 7] += 0.5
    apply_saml(model, SAMLConfig(num_experts=0))
    save_saml(model, processor, tmp_path)
    assert torch.equal(logits(load_saml(tmp_path)[0]), logits(model))


@pytest.mark.parametrize("expert_format", ["float16", "int8"])
def test_rounding_experts_is_idempotent(expert_format: Any) -> None:
    model = small_whisper()
    apply_saml(model, SAMLConfig(num_experts=2, rank=2, expert_format=expert_format))
    trained(model)
    before = {n: p.clone() for n, p in model.saml.experts().items()}
    model.saml.round_experts()
    once = {n: p.clone() for n, p in model.saml.experts().items()}
    model.saml.round_experts()
    for name, parameter in model.saml.experts().items():
        assert torch.equal(parameter, once[name])
        error = (once[name] - before[name]).abs().max()
        assert 0 < error <= before[name].abs().max() / 200


def test_experts_of_any_size_pack_and_unpack() -> None:
    for shape in [(1,), (3, 5), (2, 2, 64), (129,)]:
        value = torch.randn(shape)
        for expert_format in ("int8", "float16"):
            packed = pack_experts({"a": value}, expert_format)
            back = unpack_expert(packed, "a", value.shape)
            torch.testing.assert_close(back, value, rtol=0.01, atol=0.02)
    with pytest.raises(SAMLError, match="NaN"):
        pack_experts({"a": torch.tensor([float("nan")])}, "int8")


def test_a_plain_model_is_not_saved(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(SAMLError, match="no SAML layers"):
        save_saml(small_whisper(), processor, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def damaged(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refuse(folder: Path) -> None:
    with pytest.raises(SAMLError) as caught:
        load_saml(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"saml": 3}', '{"saml": {}, "model": []}', "[" * 9999, "\xff"],
)
def test_description_that_is_none(text: str, folder: Path, tmp_path: Path) -> None:
    copy = damaged(folder, tmp_path)
    (copy / "saml.json").write_text(text, encoding="latin-1")
    refuse(copy)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("model", "d_model", 2**20),
        ("model", "d_model", 10**12),
        ("model", "d_model", -64),
        ("model", "d_model", 0),
        ("model", "d_model", "64"),
        ("model", "d_model", None),
        ("model", "encoder_layers", 10**9),
        ("model", "decoder_layers", 10**9),
        ("model", "encoder_layers", -1),
        ("model", "encoder_layers", 2),
        ("model", "encoder_ffn_dim", 10**9),
        ("model", "decoder_ffn_dim", 10**9),
        ("model", "vocab_size", 10**9),
        ("model", "vocab_size", 299),
        ("model", "num_mel_bins", 10**8),
        ("model", "max_source_positions", 10**9),
        ("model", "max_target_positions", 10**9),
        ("model", "encoder_attention_heads", 7),
        ("model", "activation_function", "os.system"),
        ("saml", "num_experts", 10**9),
        ("saml", "num_experts", 3),
        ("saml", "num_experts", True),
        ("saml", "rank", 10**9),
        ("saml", "rank", 3),
        ("saml", "format", "int8"),
        ("saml", "format", "nf5"),
        ("saml", "block_size", 63),
        ("saml", "block_size", 128),
        ("saml", "double_quant", False),
        ("saml", "router", "utterances"),
        ("saml", "code", "import os"),
    ],
)
def test_description_that_does_not_fit_the_weights(
    part: str, key: str, value: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = damaged(folder, tmp_path)
    content = json.loads((copy / "saml.json").read_text())
    content[part][key] = value
    (copy / "saml.json").write_text(json.dumps(content))
    if isinstance(value, int) and value >= 2**20:  # nothing may be built for these

        def fail(*args: Any) -> None:
            raise AssertionError("built a model for a description that asks for too much")

        monkeypatch.setattr(storage, "apply_saml", fail)
    refuse(copy)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9999])
def test_truncated_weights(share: float, folder: Path, tmp_path: Path) -> None:
    copy = damaged(folder, tmp_path)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])
    refuse(copy)


FC1 = "model.encoder.layers.0.fc1"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{FC1}.weight.codes", lambda t: t[:-1]),
        (f"{FC1}.weight.codes", lambda t: t.view(2, -1)),
        (f"{FC1}.weight.codes", lambda t: t.to(torch.int8)),
        (f"{FC1}.weight.codes", lambda t: t.to(torch.float16)),
        (f"{FC1}.weight.codes", lambda t: t ^ 1),
        (f"{FC1}.weight.codes", None),
        (f"{FC1}.weight.absmax", lambda t: t + 1),
        (f"{FC1}.weight.nested_absmax", lambda t: t * float("nan")),
        (f"{FC1}.weight.offset", lambda t: t.new_full((), float("inf"))),
        (f"{FC1}.bias", lambda t: t[:-1]),
        (f"{FC1}.bias", lambda t: t.to(torch.int32)),
        (f"{FC1}.bias", None),
        (f"{FC1}.lora_a.int8", lambda t: t[:-1]),
        (f"{FC1}.lora_a.int8", lambda t: t.to(torch.uint8)),
        (f"{FC1}.lora_a.int8", None),
        (f"{FC1}.lora_a.scale", lambda t: t.repeat(2)),
        (f"{FC1}.lora_a.scale", lambda t: t * float("nan")),
        (f"{FC1}.router.weight.scale", None),
        ("model.decoder.embed_positions.weight", lambda t: t[:-1]),
    ],
)
def test_weights_that_do_not_fit(name: str, change: Any, folder: Path, tmp_path: Path) -> None:
    copy = damaged(folder, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    value = tensors.pop(name)
    if change is not None:
        tensors[name] = change(value).contiguous()
    save_file(tensors, copy / "model.safetensors")
    refuse(copy)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere")
    copy = damaged(folder, tmp_path)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    refuse(copy)
    (copy / "saml.json").unlink()
    refuse(copy)
