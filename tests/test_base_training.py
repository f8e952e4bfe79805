"""Stage 0 on real speech: a Conformer from nothing, and then the same commands as for Whisper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from synthetic import small_conformer
from typer.testing import CliRunner

from saml_kernels import SAMLConfig
from saml_models import adaptation, base_training
from saml_models.base_training import BASE, Shape, train_base
from saml_models.cli import app
from saml_models.corpora import Utterance, load_corpus
from saml_models.evaluation import SYSTEMS
from saml_models.surgery import apply_saml
from saml_models.training import Sample, TrainingOptions, fit

SHAPE = Shape(width=64, heads=2, encoder_layers=1, decoder_layers=1, feed_forward=64, vocabulary=32)
OPTIONS = replace(
    BASE, flat_start=1, epochs=3, max_batch=1, average=0.5, learning_rate=3e-3, checkpoint_every=1
)


class Killed(Exception):
    """What a test's `on_step` raises."""


@pytest.fixture(scope="module")
def manifest(speech_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of each of three utterances of one reader."""
    folder = tmp_path_factory.mktemp("speech")
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])[:3]
    rows = []
    for i, utterance in enumerate(found):
        soundfile.write(folder / f"{i}.wav", utterance.load()[:32000], 16000)
        rows.append({"audio": f"{i}.wav", "text": utterance.text[:40], "speaker": "ann"})
    path = folder / "voice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def utterances(manifest: Path) -> list[Utterance]:
    return load_corpus(manifest)


@pytest.fixture(scope="module")
def trained(utterances: list[Utterance]) -> Any:
    return train_base(utterances, OPTIONS, SHAPE)


def test_every_weight_and_statistic_is_trained(trained: Any) -> None:
    model, _, report = trained
    assert report.steps == 3 + 9 and not model.training
    torch.manual_seed(OPTIONS.seed)
    fresh = base_training.Conformer(SHAPE.config())
    base_training._initialise(fresh)
    before = fresh.state_dict()
    for name, value in model.state_dict().items():
        assert torch.isfinite(value).all(), name
        if value.is_floating_point() and "running" in name:
            assert not torch.equal(value, before[name]), name
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.95 * len(list(model.parameters()))


def test_a_killed_run_resumes_to_the_same_model(
    trained: Any, utterances: list[Utterance], tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"

    def kill(done: int, steps: int, loss: float) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        train_base(utterances, OPTIONS, SHAPE, checkpoint=path, on_step=kill)
    assert path.exists()
    again, _, _ = train_base(utterances, OPTIONS, SHAPE, checkpoint=path)
    for name, value in trained[0].state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(again.state_dict()[name], value), name


def test_the_loss_falls(utterances: list[Utterance]) -> None:
    options = replace(OPTIONS, flat_start=0, epochs=12, average=0.0, speeds=(1.0,), corrupt=0.0)
    _, _, report = train_base(utterances[:2], options, SHAPE)
    assert report.last_loss < 0.9 * report.first_loss


def test_adaptation_leaves_a_frozen_batch_norm_alone(utterances: list[Utterance]) -> None:
    model, processor = small_conformer()
    apply_saml(model, SAMLConfig(num_experts=2, rank=1))
    before = {n: b.clone() for n, b in model.state_dict().items() if "running" in n}
    samples = [Sample(u.load, 2.0, u.text) for u in utterances]
    fit(model, processor, samples, TrainingOptions(epochs=1, max_batch=2))
    assert before and all(torch.equal(model.state_dict()[n], b) for n, b in before.items())


def saml(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_the_same_commands_as_for_whisper(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_training, "Shape", lambda: SHAPE)
    monkeypatch.setattr(
        adaptation, "ADAPTATION", replace(adaptation.ADAPTATION, epochs=1, speeds=(1.0,))
    )
    base = tmp_path / "base"
    shown = saml("train-base", "--data", manifest, "--out", base, "--epochs", 1).stdout
    assert "parameters, in float16" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    refused = CliRunner().invoke(app, ["train-base", "--data", str(manifest), "--out", str(base)])
    assert refused.exit_code == 2 and "is there already" in refused.stderr
    profile, small = tmp_path / "ann.safetensors", tmp_path / "small"
    saml("adapt", "--model", base, "--data", manifest, "--out", profile)
    saml("transcribe", manifest.parent / "0.wav", "--model", base, "--speaker", profile)
    saml("quantize", small, "--model", base)
    saml("transcribe", manifest.parent / "0.wav", "--model", small)
    out = tmp_path / "out.json"
    saml("evaluate", "--model", base, "--data", manifest, "--folds", 3, "--json", out)
    result = json.loads(out.read_text())
    assert set(result["wer"]) == set(SYSTEMS) and out.with_suffix(".png").exists()
