"""transformers' own saving and loading of models with low-bit weights: `saml_models.hf`."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import yaml
from hf_models import experts_of, load, make
from synthetic import small_conformer, small_whisper
from torch import Tensor
from transformers import (
    AutoModelForSpeechSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    pipeline,
)

import saml_models
import saml_models.hf
from saml_kernels import SAMLConfig
from saml_models.compress.apply import apply_saml
from saml_models.compress.checkpoint import load_saml, save_saml
from saml_models.compress.loading import load_model
from saml_models.data.audio import load_audio
from saml_models.hf import SAMLQuantizationConfig
from saml_models.models.conformer.model import Conformer
from saml_models.models.whisper.loading import load_whisper
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile

REPOSITORY = Path(__file__).resolve().parents[3]

IDS = torch.tensor([[1, 5, 9, 7]])
FEATURES = {
    "whisper": torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1)),
    "conformer": torch.randn(1, 100, 64, generator=torch.Generator().manual_seed(1)),
}


@torch.no_grad()
def logits(model: Any, family: str = "whisper") -> Tensor:
    features = FEATURES[family].to(model.dtype)
    return model.eval()(input_features=features, decoder_input_ids=IDS).logits.float()


def same(model: Any, wanted: Any) -> None:
    """Every tensor, what trains, and the state of `model.saml`."""
    state = wanted.state_dict()
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, wanted)]
    assert trains[0] == trains[1]
    for name in ("config", "short_windows", "margin"):
        assert getattr(model.saml, name) == getattr(wanted.saml, name)
    assert model.saml.weight_hash() == wanted.saml.weight_hash()
    assert model.saml.experts_hash() == wanted.saml.experts_hash()


SETTINGS: dict[str, dict[str, Any]] = {
    "token": {},
    "utterance": {"router": "utterance"},
    "speaker, top 1": {"router": "speaker", "top_k": 1},
    "utterance, merged": {"router": "utterance", "mix": "merged"},
    "shared": {"router": "shared"},
    "shared, merged": {"router": "shared", "mix": "merged", "targets": "attention"},
    "no experts": {"num_experts": 0},
    "fp4": {"format": "fp4", "block_size": 128},
    "int4": {"format": "int4", "expert_format": "float16"},
    "int8": {"format": "int8"},
    "int8, scales in float32": {"format": "int8", "double_quant": False},
    "scales in float32": {"double_quant": False},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["whisper", "conformer"])
def test_there_and_back(family: str, settings: str, tmp_path: Path) -> None:
    if family == "conformer" and "shared" in settings:
        pytest.skip("shared routers are Whisper's")
    model = make(family, **SETTINGS[settings])
    model.saml.short_windows, model.saml.margin = True, 2.5
    model.save_pretrained(tmp_path)
    kind: Any = AutoModelForSpeechSeq2Seq if family == "whisper" else Conformer
    again, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    same(again, model)
    assert torch.equal(logits(again, family), logits(model, family))
    for copied in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        same(copied, model)
        experts_of(copied, 4).save_pretrained(tmp_path / "copy")
        same(kind.from_pretrained(tmp_path / "copy"), copied)
    same(again, model)


def test_a_conformer_as_canary(tmp_path: Path) -> None:
    """transformers' own class has no CTC head; all else is the saved model's."""
    model = make("conformer")
    model.save_pretrained(tmp_path)
    again, report = load(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(name.startswith("ctc_head.") for name in report["unexpected_keys"])
    assert torch.equal(logits(again, "conformer"), logits(model, "conformer"))


FRESH = """
import sys, torch
{first}
from transformers import AutoModelForSpeechSeq2Seq

model = AutoModelForSpeechSeq2Seq.from_pretrained(sys.argv[1])
mel, ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(input_features=mel, decoder_input_ids=ids).logits, sys.argv[3])
"""


def fresh(first: str, folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    torch.save((FEATURES["whisper"], IDS), out.parent / "inputs.pt")
    code = FRESH.format(first=first)
    return subprocess.run(
        [sys.executable, "-c", code, folder, out.parent / "inputs.pt", out],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip


def test_in_a_fresh_process(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "m")
    fresh("import saml_models.hf", tmp_path / "m", tmp_path / "logits.pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_without_the_import_transformers_says_what_it_does_not_know(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "m")
    done = fresh("", tmp_path / "m", tmp_path / "logits.pt")
    assert "Unknown quantization type, got saml" in done.stderr
    assert not torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))
    for file in ("config.json", "README.md"):
        assert "import saml_models.hf" in (tmp_path / "m" / file).read_text()
    code = (
        "import sys; from saml_models.models.whisper.loading import load_whisper\n"
        "try: load_whisper(sys.argv[1])\nexcept Exception as error: print(error)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m"],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert len(loaded.stdout.splitlines()) == 1


def test_a_card_for_the_hub_unless_there_is_one(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    _, header, text = (tmp_path / "README.md").read_text().split("---\n")
    assert yaml.safe_load(header) == {"library_name": "transformers", "tags": ["saml"]}
    assert "WhisperForConditionalGeneration.from_pretrained" in text
    (tmp_path / "README.md").write_text("mine")
    make().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    make().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "README.md").exists()


def test_saving_leaves_the_model_and_its_other_files_as_they_were(
    tiny_en: Any, tmp_path: Path
) -> None:
    model = make()
    save_saml(model, tiny_en[1], tmp_path / "before")
    model.save_pretrained(tmp_path / "m")
    assert "quantization_config" not in model.config.to_dict()
    again = load(tmp_path / "m")
    save_saml(again, tiny_en[1], tmp_path / "after")
    stored = [json.loads((tmp_path / n / "saml.json").read_text()) for n in ("before", "after")]
    assert "quantization_config" not in stored[1]["model"]
    same(load_saml(tmp_path / "after")[0], load_saml(tmp_path / "before")[0])


def test_what_has_changed_since_is_saved(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "one")
    model = experts_of(load(tmp_path / "one"), 5)
    model.saml.short_windows, model.saml.margin = True, 4.0
    model.save_pretrained(tmp_path / "two", max_shard_size="100KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    same(load(tmp_path / "two"), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_experts_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make().to(dtype)
    for parameter in model.saml.experts().values():
        parameter.data = parameter.data.float() + 1e-4
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    same(again, model)
    assert torch.equal(logits(again), logits(model))
    asked = load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in asked.parameters()} == {torch.float32}
    assert asked.saml.weight_hash() == model.saml.weight_hash()


def test_a_profile_fits_the_loaded_model(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    profile = SpeakerProfile.of(experts_of(model, 6), speaker="me")
    again = load(tmp_path)
    profile.apply(again)
    profile.apply(model)
    assert torch.equal(logits(again), logits(model))


def test_compressed_while_it_is_loaded(tmp_path: Path) -> None:
    config = SAMLConfig(num_experts=2, rank=2)
    whole: Any = small_whisper()
    whole.save_pretrained(tmp_path / "whole")
    model = load(tmp_path / "whole", quantization_config=SAMLQuantizationConfig(config))
    apply_saml(whole, config)
    same(model, whole)
    model.save_pretrained(tmp_path / "small")
    same(load(tmp_path / "small"), model)


def test_offloaded_to_the_disk(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "m")
    again = load(
        tmp_path / "m",
        device_map={"model.encoder": "disk", "model.decoder": "cpu", "proj_out": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


# ---- our own loading


@pytest.mark.parametrize("of", [load_model, load_adaptable, load_whisper])
def test_our_own_loading_reads_such_a_folder(of: Callable[..., Any], folder: Path) -> None:
    model, _ = of(folder)
    assert torch.equal(logits(model), logits(make()))
    assert model.saml.margin is None
    assert not model.training and model.config._name_or_path == str(folder)


def test_our_own_loading_of_a_conformer(tmp_path: Path) -> None:
    _, processor = small_conformer()
    model = make("conformer")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path)
    assert isinstance(again, Conformer)
    same(again, model)


def test_a_recogniser_says_the_same_words(speech_root: Path, tmp_path: Path) -> None:
    clip = next((speech_root / "LibriSpeech" / "test-other").rglob("*.flac"))
    first = saml_models.load("tiny.en")
    first.model.save_pretrained(tmp_path)
    first.processor.save_pretrained(tmp_path)
    again = saml_models.load(tmp_path)
    same(again.model, first.model)
    text = first.transcribe(clip).text
    assert text and again.transcribe(clip).text == text
    recognise: Any = pipeline(
        "automatic-speech-recognition",
        model=load(tmp_path),
        tokenizer=first.processor.tokenizer,
        feature_extractor=first.processor.feature_extractor,
    )
    samples = load_audio(clip)
    features = first.processor(samples, sampling_rate=16000, return_tensors="pt")
    ids = first.model.generate(features.input_features)
    (wanted,) = first.processor.batch_decode(ids, skip_special_tokens=True)
    # Left alone, this pipeline searches with five beams.
    assert recognise(samples, generate_kwargs={"num_beams": 1})["text"] == wanted


# ---- training


class Clips(torch.utils.data.Dataset[Any]):
    """Six clips of noise with random labels."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(index)
        return {
            "input_features": torch.randn(80, 3000, generator=noise),
            "labels": torch.randint(3, 200, (5,), generator=noise),
        }


def trainer(model: Any, out: Path) -> Seq2SeqTrainer:
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(out), report_to=[], use_cpu=True, per_device_train_batch_size=2,
        max_steps=4, save_steps=2, learning_rate=1e-2, seed=7, disable_tqdm=True,
    )  # fmt: skip
    return Seq2SeqTrainer(model=model, args=arguments, train_dataset=Clips())


def test_a_trainer_s_checkpoint_loses_nothing(tmp_path: Path) -> None:
    whole = trainer(make(), tmp_path / "run")
    whole.train()
    wanted = logits(whole.model)
    assert not torch.equal(wanted, logits(make()))
    half = tmp_path / "run" / "checkpoint-2"
    for start in (make(seed=9), load(half)):
        resumed = trainer(start, tmp_path / "again")
        resumed.train(resume_from_checkpoint=str(half))
        assert torch.equal(logits(resumed.model), wanted)
    whole.save_model(str(tmp_path / "saved"))
    same(load(tmp_path / "saved"), whole.model)


@pytest.fixture
def accelerator() -> Iterator[accelerate.Accelerator]:
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(True)


def test_accelerate_saves_and_loads(accelerator: Any, tmp_path: Path) -> None:
    model = make()
    optimiser = torch.optim.AdamW(model.saml.experts().values(), 1e-2)
    prepared, optimiser = accelerator.prepare(model, optimiser)
    loss = prepared.train()(input_features=FEATURES["whisper"], labels=IDS).loss
    accelerator.backward(loss)
    optimiser.step()
    wanted = logits(prepared)
    accelerator.save_state(str(tmp_path / "state"))
    experts_of(accelerator.unwrap_model(prepared), 9)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(logits(prepared), wanted)
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path / "m", is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    assert torch.equal(logits(load(tmp_path / "m")), wanted)


@pytest.mark.parametrize("empty", [False, True])
def test_accelerate_fills_a_model(empty: bool, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    other: Any = make(seed=9)
    if empty:
        with accelerate.init_empty_weights():
            other = small_whisper()
        other.tie_weights()
        apply_saml(other, SAMLConfig(num_experts=2, rank=2, expert_init="lora"))
    filled = accelerate.load_checkpoint_and_dispatch(other, tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(filled), logits(model))


# ---- the hub


class Reached(Exception):
    """The upload, of which there is none here."""


def test_push_to_hub_uploads_such_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from huggingface_hub import ModelCard
    from transformers.utils import hub

    def upload(self: Any, folder: str, *given: Any, **more: Any) -> None:
        shutil.copytree(folder, tmp_path / "sent")
        raise Reached

    repository = SimpleNamespace(create_repo=lambda *a, **k: SimpleNamespace(repo_id="me/mine"))
    for name in ("hf_api", "create_repo"):  # one of them, by transformers' version
        fake = (lambda: repository) if name == "hf_api" else repository.create_repo
        monkeypatch.setattr(hub, name, fake, raising=False)
    card = ModelCard("---\nlibrary_name: transformers\n---\n")
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: card)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model = make()
    with pytest.raises(Reached):
        model.push_to_hub("me/mine")
    same(load(tmp_path / "sent"), model)
