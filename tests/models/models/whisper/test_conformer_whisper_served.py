"""All that serves a Whisper serves one with Conformer blocks; random weights, clips of noise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import divergence, small_conformer_whisper
from torch import nn

from saml_kernels import SAMLConfig, SAMLLinear
from saml_models.compress.apply import apply_saml
from saml_models.compress.calibrate import calibrate
from saml_models.compress.calibration_speech import CalibrationClip
from saml_models.compress.checkpoint import load_saml, save_saml
from saml_models.compress.layers import quantised_tensors
from saml_models.data.corpora import utterances_of
from saml_models.evaluation.protocol import SYSTEMS
from saml_models.models.registry import bind
from saml_models.models.whisper.conformer import ConformerWhisper
from saml_models.recogniser import Recogniser
from saml_models.speakers.profile import SpeakerProfile
from saml_models.training.options import TrainingOptions
from saml_models.training.pretrain import pretrain
from saml_models.transcription.clips import decode_clips

CONFIG = SAMLConfig(num_experts=2, rank=2, expert_init="lora")
QUICK = TrainingOptions(epochs=1, max_batch=2, batch_seconds=8.0, learning_rate=1e-3)


@pytest.fixture(scope="module")
def pair(tiny_en: Any) -> tuple[Any, Any]:
    """Two blocks a side, Whisper's tokens and its rules of generation."""
    network = small_conformer_whisper(layers=2, vocabulary=51864)
    network.generation_config = copy.deepcopy(tiny_en[0].generation_config)
    return network, tiny_en[1]


@pytest.fixture(scope="module")
def clips() -> list[Any]:
    draw = np.random.default_rng(0)
    return [draw.normal(0, 0.1, n).astype(np.float32) for n in (8000, 14000, 10000, 20000)]


@pytest.fixture(scope="module")
def spoken(clips: list[Any]) -> list[tuple[Any, str]]:
    return [(clip, f"Some words, {i} of them.") for i, clip in enumerate(clips)]


def compressed(pair: tuple[Any, Any], seed: int | None = None) -> tuple[Any, Any]:
    network = copy.deepcopy(pair[0])
    apply_saml(network, CONFIG)
    if seed is not None:
        speak(network, seed)
    return network, pair[1]


@torch.no_grad()
def speak(network: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in network.saml.experts().values():
        parameter.copy_(torch.randn_like(parameter) * 0.05)


def test_low_bits_everywhere_but_the_depthwise_convolutions(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    network = copy.deepcopy(pair[0])
    report = apply_saml(network, CONFIG)
    at = "model.encoder.layers.{}.conv_module.depthwise"
    assert report.kept == {
        **{at.format(i): "depthwise" for i in range(2)},
        **{f"model.{side}.embed_positions": "positions" for side in ("encoder", "decoder")},
    }
    block = network.model.encoder.layers[0]
    for layer in (
        *(block.half_step.fc1, block.half_step.fc2),
        *(block.conv_module.pointwise_in, block.conv_module.pointwise_out),
    ):
        assert type(layer) is SAMLLinear and layer.lora_a.numel()
    assert type(block.conv_module.depthwise) is nn.Conv1d
    save_saml(network, pair[1], tmp_path / "own")
    again, _ = load_saml(tmp_path / "own")
    network.save_pretrained(tmp_path / "theirs")
    theirs = ConformerWhisper.from_pretrained(tmp_path / "theirs")
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_calibration_walks_through_the_new_branches(
    pair: tuple[Any, Any], clips: list[Any]
) -> None:
    network, processor = pair
    draw = np.random.default_rng(1)
    heard = [
        CalibrationClip(c, (50257, 50362, *draw.integers(0, 50000, 12).tolist(), 50256), 2)
        for c in clips
    ]
    titles: list[tuple[int, int, str]] = []
    config = SAMLConfig(num_experts=0)
    found = calibrate(bind(*pair), heard, config, on_progress=lambda *step: titles.append(step))
    assert [done for done, _, _ in titles] == list(range(1, titles[-1][1] + 1))
    order = [title.removeprefix("model.encoder.layers.0.") for _, _, title in titles][2:10]
    assert order == [
        *("half_step.fc1", "half_step.fc2", "self_attn.q_proj", "self_attn.out_proj"),
        *("conv_module.pointwise_in", "conv_module.pointwise_out", "fc1", "fc2"),
    ]
    plain, made = copy.deepcopy(network), copy.deepcopy(network)
    apply_saml(plain, config)
    apply_saml(made, config, calibration=found)
    names = {name.removesuffix(".weight") for name in quantised_tensors(plain)}
    assert set(found.weights) == names
    before = divergence(network, plain, processor, heard)
    assert divergence(network, made, processor, heard) < 0.8 * before


def test_rows_of_a_batch_have_the_words_that_they_have_alone(
    pair: tuple[Any, Any], clips: list[Any]
) -> None:
    network, processor = compressed(pair, seed=1)
    profiles: list[SpeakerProfile | None] = [None]
    with network.saml.snapshot():
        for seed in (2, 3):
            speak(network, seed)
            profiles.append(SpeakerProfile.of(network, speaker=str(seed), short_windows=True))
    speech, who = bind(network, processor), [*profiles, profiles[1]]
    for beams in (1, 2):
        found = decode_clips(speech, clips, speakers=who, beam_size=beams)
        alone = [
            decode_clips(speech, [clip], speakers=[one], beam_size=beams)[0]
            for clip, one in zip(clips, who, strict=True)
        ]
        assert found == alone and len(set(found)) > 1


def test_pretraining_and_what_the_loop_guard_stops(
    pair: tuple[Any, Any], spoken: list[tuple[Any, str]]
) -> None:
    network, processor = compressed(pair)
    before = {n: p.detach().clone() for n, p in network.saml.experts().items()}
    profile = pretrain(
        network, processor, utterances_of(spoken), QUICK, original=copy.deepcopy(pair[0])
    )
    learnt = network.saml.experts()
    inner = "conv_module.pointwise_in.lora_b"
    moved = [n for n in learnt if n.endswith(inner) and not torch.equal(learnt[n], before[n])]
    assert len(moved) == 2 and profile.about["utterances"] == 4
    # One token whatever was heard: a loop, which is said once.
    with torch.no_grad():
        network.model.decoder.layer_norm.weight.zero_()
        row = network.model.decoder.embed_tokens.weight.rows(torch.tensor([262]))[0]
        network.model.decoder.layer_norm.bias.copy_(row * 100)
    (text,) = decode_clips(bind(network, processor), [spoken[3][0]])
    assert len(text.split()) <= 1


def test_the_recogniser_adapts_transcribes_evaluates_and_saves(
    pair: tuple[Any, Any], spoken: list[tuple[Any, str]], tmp_path: Path
) -> None:
    folder, spoken = tmp_path / "model", spoken[:2]
    network = copy.deepcopy(pair[0])
    with torch.no_grad():  # texts of a few tokens
        end = network.model.decoder.embed_tokens.weight[50256]
        network.model.decoder.layer_norm.bias.add_(4 * end)
    for part in (network, pair[1]):
        part.save_pretrained(folder)
    recogniser = Recogniser.load(folder)
    assert isinstance(recogniser.model, ConformerWhisper)
    profile = recogniser.adapt(spoken, speaker="ann", options=QUICK)
    plain = recogniser.transcribe(spoken[0][0])
    assert recogniser.transcribe(spoken[0][0], profile, timestamps=True).speaker_hash
    results = recogniser.evaluate(spoken, options=QUICK)
    assert set(results.to_dict()["wer"]) == set(SYSTEMS)
    recogniser.save(tmp_path / "small")
    again = Recogniser.load(tmp_path / "small")
    assert again.transcribe(spoken[0][0]).text == plain.text
    profile.check(again.model)
