"""Adapters that PEFT itself made: heard as PEFT hears them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import small_whisper
from torch import Tensor

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.compress.layers import quantised_tensors
from saml_models.speakers.peft import export_experts, import_adapters
from saml_models.speakers.pretrained import profile_config
from saml_models.speakers.profile import SpeakerProfile

peft = pytest.importorskip("peft")

IDS = torch.tensor([[1, 5, 9, 7]])
MEL = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))
EVERY = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_features=MEL, decoder_input_ids=IDS).logits


def treated(config: SAMLConfig | None = None) -> Any:
    model: Any = small_whisper()
    apply_saml(model, config or SAMLConfig(num_experts=1, rank=1, expert_init="lora"))
    return model


@torch.no_grad()
def dense() -> Any:
    """The base that our model has, in full precision: PEFT's to adapt."""
    model, ours = small_whisper(), treated()
    state = {n: t for n, t in ours.state_dict().items() if n in model.state_dict()}
    state |= {f"{n}": q.dequantize() for n, q in quantised_tensors(ours).items()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


@torch.no_grad()
def trained(model: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def adapter(folder: Path, **options: Any) -> Any:
    """A PEFT model after training, saved to `folder`."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": EVERY, **options})
    model = trained(peft.get_peft_model(dense(), config)).eval()
    model.save_pretrained(folder)
    return model


def imported(*folders: Path) -> Any:
    profile = import_adapters(folders, treated(), "ann")
    model = treated(profile_config(profile))
    profile.apply(model)
    return model


def change(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(SAMLError) as caught:
        import_adapters([folder], treated(), "ann")
    (line,) = str(caught.value).splitlines()
    assert all(word in line for word in words), line


PATTERNS = {
    # In part a name, in part an expression; the first that fits is taken.
    "rank_pattern": {r"layers\.\d+\.self_attn\.[qk]_proj": 2, "fc1": 8, "q_proj": 3},
    "alpha_pattern": {"fc1": 3, r"^model.encoder.layers.0.fc2": 9, r".*encoder_attn\.v_proj": 1},
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"use_rslora": True},
        PATTERNS,
        {**PATTERNS, "use_rslora": True},
        {"fan_in_fan_out": True, "lora_dropout": 0.5},
        {"target_modules": ["fc1"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": r".*decoder.*\.(fc1|q_proj)", "exclude_modules": ["fc2"]},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_logits_are_those_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = adapter(tmp_path, **options)
    expected, plain = logits(theirs), logits(dense())
    assert (expected - plain).norm() > 0.01 * plain.norm()
    found = logits(imported(tmp_path))
    assert (found - expected).norm() < 0.02 * (expected - plain).norm()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_starts_that_change_the_base_are_refused_by_name(start: str, tmp_path: Path) -> None:
    adapter(tmp_path, init_lora_weights=start)
    refused(tmp_path, repr(start), "path_initial_model_for_weight_conversion")


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq", "something new"])
def test_starts_that_need_data_or_are_unknown_are_refused_by_name(
    start: str, tmp_path: Path
) -> None:
    adapter(tmp_path)
    change(tmp_path, init_lora_weights=start)
    refused(tmp_path, repr(start), "changes the base")


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc2": 3}}]
)
def test_converted_adapters_mean_what_they_meant(
    start: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=4, target_modules=EVERY, init_lora_weights=start, **options)
    model = peft.get_peft_model(dense(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    trained(model).eval().save_pretrained(
        tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    expected = logits(model)
    again = peft.PeftModel.from_pretrained(dense(), tmp_path / "done").eval()
    plain = logits(dense())
    bound = 0.02 * (expected - plain).norm()
    assert (logits(again) - expected).norm() < bound
    assert (logits(imported(tmp_path / "done")) - expected).norm() < bound


def test_real_options_that_change_the_meaning_are_refused_by_name(tmp_path: Path) -> None:
    embeddings = {"target_modules": ["q_proj", "embed_tokens"]}
    for i, (options, *words) in enumerate(
        (
            ({"use_dora": True}, "use_dora"),
            ({"bias": "lora_only"}, "bias=lora_only"),
            ({"bias": "all"}, "bias=all"),
            ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
            ({"modules_to_save": ["fc1"], "target_modules": ["q_proj"]}, "modules_to_save"),
            (embeddings, "embed_tokens"),
            ({"trainable_token_indices": [1, 5]}, "trainable_token_indices"),
            ({"target_modules": ["conv1"]}, "conv1", "matrix"),
        )
    ):
        adapter(tmp_path / str(i), **options)
        refused(tmp_path / str(i), *words)


@pytest.mark.parametrize(
    "options",
    [
        {"layer_replication": [[0, 1], [0, 1]]}, {"use_qalora": True},
        {"alora_invocation_tokens": [1]}, {"use_bdlora": {}, "kasa_config": {"beta": 1}},
        {"arrow_config": {"top_k": 2}}, {"target_parameters": ["weight"]},
        {"monteclora_config": {"n": 1}}, {"velora_config": {"n": 1}}, {"an_option_to_come": True},
    ],
    ids=str,
)  # fmt: skip
def test_other_options_that_change_the_meaning_are_refused_by_name(
    options: dict[str, Any], tmp_path: Path
) -> None:
    adapter(tmp_path)
    change(tmp_path, **options)
    refused(tmp_path, next(name for name, value in options.items() if value))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"r": 8}, "has rank 4; its configuration says 8"),
        ({"rank_pattern": {"fc1": 2}}, "has rank 4; its configuration says 2"),
        ({"rank_pattern": {"(": 2}}, "configuration"),
        ({"rank_pattern": ["fc1"]}, "configuration"),
        ({"alpha_pattern": {"fc1": "x"}}, "configuration"),
        ({"alpha_pattern": {"fc1": float("inf")}}, "configuration"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": "LOHA"}, "LOHA"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    adapter(tmp_path)
    change(tmp_path, **options)
    refused(tmp_path, word)
    (tmp_path / "adapter_config.json").write_text("[]")
    refused(tmp_path, "configuration")


@pytest.mark.parametrize(
    ("made_for", "model", "fits"),
    [
        ("openai/whisper-base.en", "base", False), ("openai/whisper-base", "base.en", False),
        ("openai/whisper-large-v2", "large-v1", False), ("openai/whisper-base", "base", True),
        ("base", "openai/whisper-base", True), ("turbo", "large-v3-turbo", True),
        ("me/fine-tuned", "base", True), ("openai/whisper-base", "/models/mine", True),
        (None, "base", True), ("openai/whisper-base", "", True),
    ],
)  # fmt: skip
def test_adapters_of_another_base(made_for: Any, model: str, fits: bool, tmp_path: Path) -> None:
    adapter(tmp_path)
    change(tmp_path, base_model_name_or_path=made_for)
    ours = treated()
    ours.config._name_or_path = model
    if fits:
        assert import_adapters([tmp_path], ours, "ann").about["model"] == model
    else:
        with pytest.raises(SAMLError, match=f"made for {made_for}; the model is {model}"):
            import_adapters([tmp_path], ours, "ann")


def test_what_is_exported_can_be_imported(tmp_path: Path) -> None:
    adapter(tmp_path / "a", **PATTERNS)
    adapter(tmp_path / "b", use_rslora=True)
    profile = import_adapters([tmp_path / "a", tmp_path / "b"], treated(), "ann")
    model = treated(profile_config(profile))
    profile.apply(model)
    folders = export_experts(profile, model, tmp_path / "out")
    assert (logits(imported(*folders)) - logits(model)).norm() < 1e-3 * logits(model).norm()


def test_an_exported_configuration_is_what_peft_would_write(tmp_path: Path) -> None:
    """Field by field, those that PEFT fills in included."""
    model = treated(SAMLConfig(num_experts=2, rank=3, alpha=5.0, expert_init="lora"))
    profile = SpeakerProfile.of(model, speaker="ann", model="tiny.en")
    (folder, _) = export_experts(profile, model, tmp_path)
    found = peft.LoraConfig.from_pretrained(folder)
    wanted = peft.LoraConfig(
        r=3, lora_alpha=5.0, target_modules=list(model.saml.layers), inference_mode=True,
        base_model_name_or_path="tiny.en",
    )  # fmt: skip
    assert found.to_dict() == wanted.to_dict()
