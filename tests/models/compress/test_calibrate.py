"""Calibrated rounding of a whole Whisper: nearer to the full model, and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import divergence, small_whisper

from saml_kernels import SAMLConfig, SAMLError, quantize
from saml_kernels.quantization import rounding
from saml_models.compress import calibrate as module
from saml_models.compress.apply import apply_saml
from saml_models.compress.calibrate import Recipe, calibrate
from saml_models.compress.calibration_rows import shift_of
from saml_models.compress.calibration_speech import (
    CalibrationClip,
    choose_utterances,
    clips_hash,
    prepare_clips,
)
from saml_models.compress.calibration_walk import EMBEDDING, finer_rows
from saml_models.compress.checkpoint import load_saml, save_saml
from saml_models.compress.layers import quantised_tensors
from saml_models.data.corpora import Utterance
from saml_models.models.registry import bind
from saml_models.models.whisper.windows import audio_window, log_mel, window_frames

CONFIG = SAMLConfig(num_experts=0)


@pytest.fixture(scope="module")
def model() -> Any:
    network = small_whisper(layers=2, vocabulary=51864)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # biases and outlying columns, as trained models have them
        for name, value in network.named_parameters():
            if name.endswith("bias"):
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)
        network.model.decoder.embed_tokens.weight[:, 5].add_(0.3)
    return network.eval()


@pytest.fixture(scope="module")
def clips() -> list[CalibrationClip]:
    random = np.random.default_rng(0)
    found = []
    for i in range(6):
        samples = random.normal(0, 0.1, 16000 + 2400 * i).astype(np.float32)
        tokens = (50257, 50362, *random.integers(0, 50000, 14 + i).tolist(), 50256)
        found.append(CalibrationClip(samples, tokens, 2))
    return found


@pytest.fixture(scope="module")
def calibration(model: Any, tiny_en: Any, clips: list[CalibrationClip]) -> Any:
    return calibrate(bind(model, tiny_en[1]), clips, CONFIG)


def compressed(model: Any, calibration: Any = None) -> Any:
    found = copy.deepcopy(model)
    apply_saml(found, CONFIG, calibration=calibration)
    return found


def test_every_layer_is_there_and_the_distribution_is_nearer(
    model: Any, tiny_en: Any, clips: list[CalibrationClip], calibration: Any
) -> None:
    plain, made = compressed(model), compressed(model, calibration)
    names = {name.removesuffix(".weight") for name in quantised_tensors(plain)}
    assert set(calibration.weights) == names
    finer = calibration.finer[EMBEDDING]
    parts = calibration.weights | {f"{EMBEDDING}.finer": finer.weight}
    for name, weight in quantised_tensors(made).items():
        assert torch.equal(weight.codes, parts[name.removesuffix(".weight")].codes)
    size = {m: sum(t.nbytes for t in quantised_tensors(m).values()) for m in (plain, made)}
    assert len(finer.rows) == Recipe().finer_rows
    assert size[plain] == size[made] - finer.weight.nbytes
    before = divergence(model, plain, tiny_en[1], clips)
    after = divergence(model, made, tiny_en[1], clips)
    assert after < 0.7 * before


def test_finer_rows_are_those_whose_errors_tell_most() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40, 64, generator=generator)
    weight = quantize(table)
    states = [torch.randn(50, 64, generator=generator) * 0.2 for _ in range(3)]
    found = finer_rows(weight, table, states, 8)
    assert found is not None and len(found.rows) == 8 and (found.rows.diff() > 0).all()
    hidden, coarse = torch.cat(states), weight.dequantize()

    def kl(rows: torch.Tensor, more: torch.Tensor) -> float:
        rounded = coarse.index_add(0, rows, more)
        full, other = ((hidden @ one.T).log_softmax(-1) for one in (table, rounded))
        return float((full.exp() * (full - other)).sum(-1).mean())

    own = kl(found.rows.long(), found.weight.dequantize())
    for _ in range(10):
        rows = torch.randperm(40, generator=generator)[:8]
        assert own < kl(rows, (table - coarse)[rows])
    assert finer_rows(weight, table, states, 0) is None
    assert finer_rows(quantize(table, "int8"), table, states, 3) is None


def test_the_rounded_side_is_the_model_that_comes_out(
    model: Any,
    tiny_en: Any,
    clips: list[CalibrationClip],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = []

    class Seen(module._Run):
        def _decoder(self, heard: Any) -> Any:
            runs.append(super()._decoder(heard))
            return runs[-1]

    monkeypatch.setattr(module, "_Run", Seen)
    made = compressed(model, calibrate(bind(model, tiny_en[1]), clips[:2], CONFIG))
    (rows,) = runs
    for clip, span, margin in zip(clips, rows.spans, (10.0, 1.0), strict=False):
        frames = window_frames(len(clip.samples), margin)
        for network, hidden, norm in (
            (model, rows.x[span], model.model.decoder.layer_norm),
            (made, rows.y[span], made.model.decoder.layer_norm),
        ):
            with torch.no_grad(), audio_window(network, frames):
                found = network.model(
                    input_features=log_mel(tiny_en[1], [clip.samples], frames),
                    decoder_input_ids=torch.tensor([clip.tokens[:-1]]),
                    use_cache=False,
                ).last_hidden_state[0]
            torch.testing.assert_close(norm(hidden), found, rtol=2e-3, atol=2e-3)


def test_the_shift_changes_no_probability(model: Any, tiny_en: Any, clips: Any) -> None:
    table = model.model.decoder.embed_tokens.weight.detach()
    vector = shift_of(table, torch.rand(len(table), dtype=torch.float64))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.model.decoder.embed_tokens.weight.sub_(vector)
        moved.model.decoder.embed_positions.weight.add_(vector)
    assert divergence(model, moved, tiny_en[1], clips) < 1e-6


@pytest.mark.parametrize("format", ["fp4", "int4", "int8"])
def test_other_formats(model: Any, tiny_en: Any, clips: Any, format: Any) -> None:
    config = SAMLConfig(num_experts=0, format=format)
    found = calibrate(bind(model, tiny_en[1]), clips[:3], config)
    plain, made = copy.deepcopy(model), copy.deepcopy(model)
    apply_saml(plain, config)
    apply_saml(made, config, calibration=found)
    own = {weight.format for weight in quantised_tensors(made).values()}
    assert own == {format}
    before = divergence(model, plain, tiny_en[1], clips[:3])
    assert divergence(model, made, tiny_en[1], clips[:3]) < before


def test_killed_and_started_again(
    model: Any,
    tiny_en: Any,
    clips: list[CalibrationClip],
    calibration: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(Exception):
        pass

    def stop(done: int, total: int, title: str) -> None:
        if done == 9:
            raise Killed

    with pytest.raises(Killed):
        calibrate(bind(model, tiny_en[1]), clips, CONFIG, folder=tmp_path, on_progress=stop)
    rounded = []
    together = rounding.round_together

    def count(weights: Any, *args: Any, **options: Any) -> Any:
        rounded.append(options["name"])
        return together(weights, *args, **options)

    monkeypatch.setattr(module, "round_together", count)
    steps = []
    again = calibrate(
        bind(model, tiny_en[1]),
        clips,
        CONFIG,
        folder=tmp_path,
        on_progress=lambda *step: steps.append(step[:2]),
    )
    total = steps[-1][1]
    assert steps == [(i + 1, total) for i in range(total)]
    assert len(rounded) == total - 9
    for name, weight in calibration.weights.items():
        for part, value in weight.named_buffers():
            assert torch.equal(value, getattr(again.weights[name], part)), name
    for name, value in calibration.parameters.items():
        assert torch.equal(value, again.parameters[name])
    # Other clips are another calibration: nothing of the old one is taken.
    rounded.clear()
    calibrate(bind(model, tiny_en[1]), clips[:2], CONFIG, folder=tmp_path)
    assert len(rounded) == total


def test_on_disk_and_back(model: Any, tiny_en: Any, calibration: Any, tmp_path: Path) -> None:
    made = compressed(model, calibration)
    save_saml(made, tiny_en[1], tmp_path)
    again, _ = load_saml(tmp_path)
    assert again.saml.calibration == calibration.about
    assert calibration.about["recipe"]["damping"] == Recipe().damping
    for name, value in made.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_saved_by_transformers_and_back(model: Any, calibration: Any, tmp_path: Path) -> None:
    made = compressed(model, calibration)
    made.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.saml.calibration == calibration.about
    for name, value in made.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_experts_beside_calibrated_weights_start_at_nothing(model: Any, calibration: Any) -> None:
    made = copy.deepcopy(model)
    apply_saml(made, SAMLConfig(num_experts=2, rank=2), calibration=calibration)
    assert made.saml.layers
    for layer in made.saml.layers.values():
        assert torch.count_nonzero(layer.lora_b) == 0 and torch.count_nonzero(layer.lora_a) > 0


def test_a_calibration_of_something_else_is_refused(model: Any, calibration: Any) -> None:
    other = small_whisper(layers=1, vocabulary=51864)
    with pytest.raises(SAMLError, match="no such layer"):
        apply_saml(other, CONFIG, calibration=calibration)
    fresh = copy.deepcopy(model)
    with pytest.raises(SAMLError, match=r"calibrated as nf4.*expected int4"):
        apply_saml(fresh, SAMLConfig(num_experts=0, format="int4"), calibration=calibration)
    assert not quantised_tensors(fresh)
    with pytest.raises(SAMLError, match="full precision"):
        calibrate(bind(compressed(model), None), [None])  # type: ignore[arg-type, list-item]
    with pytest.raises(SAMLError, match="no clips"):
        calibrate(bind(model, None), [])  # type: ignore[arg-type]


def test_utterances_of_many_speakers_are_chosen() -> None:
    many = [
        Utterance(f"{speaker}-{i}", speaker, "text", Path("x"))
        for speaker, count in (("a", 100), ("b", 3), ("c", 1))
        for i in range(count)
    ]
    chosen = choose_utterances(many, 7, seed=1)
    counts = {s: sum(u.speaker == s for u in chosen) for s in "abc"}
    assert counts == {"a": 3, "b": 3, "c": 1}
    assert choose_utterances(many, 7, seed=1) == chosen
    assert choose_utterances(many, 7, seed=2) != chosen
    assert len(choose_utterances(many, 1000)) == 104
    with pytest.raises(SAMLError, match="no utterance"):
        choose_utterances([])


def test_clips_that_are_too_short_or_long_take_no_place(tiny_en: Any) -> None:
    class Spoken(Utterance):
        def load(self) -> Any:
            return np.full(round(16000 * float(self.id)), 0.01, np.float32)

    spoken = [Spoken(length, "a", "Words.", Path("x")) for length in ("0.5", "40", "1", "2", "3")]
    done: list[int] = []
    found = prepare_clips(bind(*tiny_en), spoken, noise=False, count=2, on_done=done.append)
    assert [len(clip.samples) // 16000 for clip in found] == [1, 2] and done == [1, 1]


def test_noise_is_as_loud_as_said_and_seeded(tiny_en: Any) -> None:
    class Spoken(Utterance):
        def load(self) -> Any:
            seed = int(self.id)
            return np.random.default_rng(seed).normal(0, 0.05, 20000 + seed).astype(np.float32)

    model, processor = tiny_en
    spoken = [Spoken(str(i), "a", "SOME WORDS", Path("x")) for i in range(5)]
    found = prepare_clips(bind(model, processor), spoken, seed=3)
    assert len(found) == 10
    for clean, noisy in zip(found[:5], found[5:], strict=True):
        assert noisy.tokens == clean.tokens and noisy.samples.dtype == np.float32
        noise = noisy.samples - clean.samples
        ratio = 10 * np.log10(np.mean(clean.samples**2) / np.mean(noise**2))
        assert 4.9 < ratio < 15.1
    same = prepare_clips(bind(model, processor), spoken, seed=3)
    assert clips_hash(found) == clips_hash(same)
    assert clips_hash(found) != clips_hash(prepare_clips(bind(model, processor), spoken, seed=4))
    text = processor.tokenizer.decode(found[0].tokens[2:-1]).strip().lower()
    assert text.rstrip(".") == "some words"
