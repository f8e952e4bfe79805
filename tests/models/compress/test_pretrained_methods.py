"""What transformers, accelerate and PyTorch ask of a model: it works, or one line says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from synthetic import small_conformer, small_whisper
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForSpeechSeq2Seq, Trainer, TrainingArguments

from saml_kernels import SAMLConfig, SAMLError
from saml_kernels.quantization.tensor import QuantizedTensor
from saml_models.compress.apply import apply_saml

IDS = torch.tensor([[1, 5, 9, 7]])
MEL = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))


def make(**settings: Any) -> Any:
    model: Any = small_whisper()
    apply_saml(model, SAMLConfig(**{"num_experts": 2, "rank": 2, **settings}))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.saml.experts().values():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    return model(input_features=MEL.to(dtype), decoder_input_ids=IDS).logits.float()


def one_line(act: Callable[[], Any], *words: str) -> None:
    with pytest.raises(SAMLError) as caught:
        act()
    (line,) = str(caught.value).splitlines()
    assert all(word in line for word in words), line


@pytest.mark.parametrize("family", ["whisper", "conformer"])
def test_saving_a_part_the_way_of_transformers_is_refused(family: str, tmp_path: Path) -> None:
    model: Any = small_whisper() if family == "whisper" else small_conformer()[0]
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    for part in (model.get_encoder(), model.get_decoder(), copy.deepcopy(model).get_encoder()):
        target = tmp_path / "saved"
        one_line(lambda: part.save_pretrained(target), "save_pretrained", "whole model")  # noqa: B023
        assert not target.exists()
        one_line(lambda: part.push_to_hub("me/mine"), "push_to_hub", "whole model")  # noqa: B023


def test_the_trainer_saves_the_whole_model(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True)
    model = make()
    Trainer(model=model, args=arguments).save_model(str(tmp_path / "saved"))
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


def test_a_state_dict_there_and_back(tmp_path: Path) -> None:
    model, other = make(), make()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    found = other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("strict", [True, False])
def test_full_precision_weights_are_not_half_loaded(strict: bool) -> None:
    model = make()
    before = logits(model)
    full = small_whisper(1).state_dict()
    for target in (model, copy.deepcopy(model)):
        one_line(
            lambda: target.load_state_dict(full, strict=strict),  # noqa: B023
            "conv1.weight: in full precision", "apply_saml",
        )  # fmt: skip
    assert torch.equal(logits(model), before)


def test_the_vocabulary_stays() -> None:
    model = make()
    embedding = model.get_input_embeddings()
    assert model.resize_token_embeddings() is embedding
    assert model.resize_token_embeddings(300) is embedding
    before = logits(model)
    for part in (model, model.model, model.get_decoder()):
        one_line(lambda: part.resize_token_embeddings(310), "300 tokens", "full-precision")  # noqa: B023
        one_line(lambda: part.resize_token_embeddings(300, 64), "300 tokens")  # noqa: B023
    assert torch.equal(logits(model), before) and model.config.vocab_size == 300


@pytest.mark.parametrize("family", ["whisper", "conformer"])
def test_ties_between_layers_that_were_replaced(family: str) -> None:
    model: Any = small_whisper() if family == "whisper" else small_conformer()[0]
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for act in (model.tie_weights, model.init_weights, model.post_init):
        act()
        assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(embedding.weight, QuantizedTensor)
    assert head.weight is embedding.weight
    assert head.weight.shape == (model.config.vocab_size, embedding.embedding_dim)


def test_a_tie_that_is_still_there_is_kept() -> None:
    model: Any = small_whisper()
    model.proj_out.register_forward_hook(lambda *_: None)  # so that both stay
    apply_saml(model, SAMLConfig(num_experts=2, rank=2))
    model.proj_out.weight = nn.Parameter(torch.zeros(300, 64))
    model.tie_weights()
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_back(dtype: torch.dtype) -> None:
    model = make()
    before = logits(model)
    changed = model.to(dtype)
    assert changed.dtype == dtype
    bound = {torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.float64: 1e-5}[dtype]
    assert (logits(changed) - before).norm() < bound * before.norm()
    # Codes and scales are what they were; only what was in float32 has lost bits.
    assert (logits(changed.float()) - before).norm() < bound * before.norm()


def test_meta_and_counts() -> None:
    model = make()
    trainable = sum(p.numel() for p in model.saml.experts().values())
    assert model.num_parameters(only_trainable=True) == trainable
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.get_memory_footprint() >= sum(b.nbytes for b in model.buffers())
    state = {n: t.shape for n, t in model.state_dict().items()}
    empty = copy.deepcopy(model).to("meta")
    assert {n: t.shape for n, t in empty.state_dict().items()} == state
    assert accelerate.infer_auto_device_map(model, {"cpu": 10**9}) == {"": "cpu"}


def test_gradient_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_features=MEL, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.saml.experts().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_pruning_and_reparametrising_a_weight_in_low_bits() -> None:
    model = make()
    before = logits(model)
    layer = model.model.encoder.layers[0].fc1
    for act in (
        lambda: prune.l1_unstructured(layer, "weight", 0.5),
        lambda: nn.utils.parametrizations.weight_norm(layer),
    ):
        with pytest.raises((TypeError, ValueError, SAMLError), match=r"QuantizedTensor|parameter"):
            act()
        assert torch.equal(logits(model), before)
    with torch.no_grad():
        layer.lora_b.normal_()
    prune.l1_unstructured(layer, "lora_b", 0.5)
    assert (layer.lora_b == 0).sum() == layer.lora_b.numel() / 2
    assert not torch.equal(logits(model), before)


def test_an_assistant_drafts() -> None:
    model = make()
    options = {"input_features": MEL, "max_new_tokens": 6, "do_sample": False}
    alone = model.generate(**options)
    assert torch.equal(model.generate(**options, assistant_model=small_whisper(1)), alone)
    assert torch.equal(model.generate(**options, assistant_model=make(num_experts=0)), alone)


OFFLOADS: dict[str, Callable[[Any, str], Any]] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "cpu_offload whole layers": lambda model, folder: accelerate.cpu_offload(
        model, "cpu", offload_buffers=True,
        preload_module_classes=["SAMLLinear", "SAMLEmbedding", "QuantizedConv1d"],
    ),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, "cpu"),
    "dispatch_model to one": lambda model, folder: accelerate.dispatch_model(
        model, {"": "cpu"}, force_hooks=True
    ),
    "dispatch_model, table and head apart": lambda model, folder: accelerate.dispatch_model(
        model, {"model.encoder": "disk", "model.decoder": "disk", "proj_out": "cpu"},
        main_device="cpu", offload_dir=folder,
    ),
    "cpu_offload_with_hook": lambda model, folder: accelerate.cpu_offload_with_hook(model, "cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFLOADS)
@pytest.mark.parametrize("router", ["token", "utterance", "speaker"])
def test_accelerate_moves_weights_in_and_out(name: str, router: Any, tmp_path: Path) -> None:
    model = make(router=router)
    before = logits(model)
    OFFLOADS[name](model, str(tmp_path))
    for _ in range(2):
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_offloaded_buffers_are_refused() -> None:
    model = make()
    accelerate.cpu_offload(model, "cpu", offload_buffers=True)
    one_line(lambda: logits(model), "meta")
