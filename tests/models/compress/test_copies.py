"""Copies of a model with SAML layers: pickled, deep-copied, sent to another process."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing
from synthetic import small_whisper
from torch import Tensor, nn
from transformers import AutoModelForSpeechSeq2Seq

from saml_kernels import SAMLConfig
from saml_models.compress.apply import apply_saml
from saml_models.compress.checkpoint import load_saml, save_saml
from saml_models.data.corpora import load_corpus
from saml_models.models.registry import bind
from saml_models.speakers.mixing import mixed_batch
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile
from saml_models.transcription.clips import decode_clips

IDS = torch.tensor([[1, 5, 9, 7]])
MEL = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))


def through_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_file,
}


@pytest.fixture(params=COPIES)
def copied(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return COPIES[request.param]


@torch.no_grad()
def voiced(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    for parameter in model.saml.experts().values():
        parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


@torch.no_grad()
def logits(model: Any, mel: Tensor = MEL) -> Tensor:
    return model(input_features=mel, decoder_input_ids=IDS.expand(len(mel), -1)).logits


def make(**settings: Any) -> Any:
    model = small_whisper()
    apply_saml(model, SAMLConfig(**{"num_experts": 2, "rank": 2, **settings}))
    return voiced(model, 3)


@pytest.mark.parametrize("router", ["token", "utterance", "speaker", "shared"])
def test_the_copy_is_whole_and_stands_on_its_own(router: Any, copied: Any, tmp_path: Any) -> None:
    model = make(router=router, mix="merged" if router == "shared" else "sum")
    hashes = model.saml.weight_hash(), model.saml.experts_hash()  # are remembered
    expected = logits(model)  # the CPU backend has described the layers by now
    twin = copied(model)
    voiced(model, 4)
    assert torch.equal(logits(twin), expected)
    assert (twin.saml.weight_hash(), twin.saml.experts_hash()) == hashes
    assert model.saml.experts_hash() != hashes[1]
    # One context state for all layers of the copy, and it is not the old one.
    context = twin.saml.context
    assert context is not model.saml.context
    own = [m.context for m in twin.modules() if hasattr(m, "context")]
    assert own and all(r is context for r in own)
    assert twin.proj_out._tied[0] is twin.model.decoder.embed_tokens
    twin.save_pretrained(tmp_path)
    saved = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert torch.equal(logits(saved), expected)


@pytest.mark.parametrize("router", ["token", "utterance", "shared"])
def test_a_model_that_is_being_trained(router: Any, copied: Any) -> None:
    """What a forward pass left behind belongs to a graph that no copy can have."""
    mix = "merged" if router == "shared" else "sum"
    model = make(router=router, mix=mix, balance=0.1).train()
    model(input_features=MEL, labels=IDS).loss.backward()
    twin = copied(model)
    for name, parameter in twin.saml.experts().items():
        assert torch.equal(parameter, model.saml.experts()[name]) and parameter.requires_grad
    twin(input_features=MEL, labels=IDS).loss.backward()
    assert torch.equal(logits(twin.eval()), logits(model.eval()))


def test_one_layer(copied: Any) -> None:
    model = make()
    layer = model.model.encoder.layers[0].fc1
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(copied(layer)(x), expected)


def test_voices_and_profiles_go_with_the_copy(copied: Any) -> None:
    model = make()
    profiles = []
    for seed in (5, 6):
        with model.saml.snapshot():
            profiles.append(SpeakerProfile.of(voiced(model, seed), speaker=str(seed)))
    profiles[0].apply(model)
    one = logits(model)
    twin = copied(model)
    profiles[1].apply(twin)
    assert torch.equal(logits(model), one) and not torch.equal(logits(twin), one)
    both = torch.cat((MEL, MEL))
    with mixed_batch(model, profiles):
        expected = logits(model, both)
        twin = copied(model)
        assert torch.equal(logits(twin, both), expected)
    # The copy's voices are its own and stay with it.
    assert all(layer.speaker_experts is None for layer in model.saml.layers.values())
    assert torch.equal(logits(twin, both), expected)
    profile = pickle.loads(pickle.dumps(profiles[0]))
    assert profile.hash == profiles[0].hash
    profile.apply(twin)


def test_what_was_loaded_says_the_same_words(speech_root: Any, tmp_path: Any, copied: Any) -> None:
    model, processor = load_adaptable("tiny.en")
    save_saml(model, processor, tmp_path / "m")
    model, processor = load_saml(tmp_path / "m")  # remembers its hash
    clip = min(
        (u.load() for u in load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])),
        key=len,
    )
    words = decode_clips(bind(model, processor), [clip])
    assert all(words) and decode_clips(bind(copied(model), copied(processor)), [clip]) == words


def _answer(model: nn.Module, mel: Tensor, results: Any) -> None:
    results.put(logits(model, mel).numpy())


@pytest.mark.slow
def test_in_another_process() -> None:
    """Spawned: after a fork torch's own OpenMP waits for threads that are not there."""
    model = make()
    model.saml.weight_hash()
    expected = logits(model)
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_answer, args=(model, MEL, results))
    process.start()
    found = torch.from_numpy(results.get(timeout=120))
    process.join(60)
    assert process.exitcode == 0 and torch.equal(found, expected)
