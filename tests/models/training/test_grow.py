"""A Conformer grown from a small random Whisper: what learns when, resumed, and the command."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from synthetic import small_conformer_whisper, small_whisper
from typer.testing import CliRunner

from saml_kernels import SAMLError
from saml_models.cli.main import app
from saml_models.compress.loading import load_model
from saml_models.data.corpora import Utterance, utterances_of
from saml_models.models.interface import QUANTISED_MARGIN, margin_of
from saml_models.models.whisper.conformer import ConformerWhisper, new_branches
from saml_models.training.checkpoint import checkpoints
from saml_models.training.grow import BRANCHES, ENCODER, Growth, grow_conformer

QUICK = {"epochs": 1, "margins": (1.0,), "max_batch": 1, "checkpoint_every": 1}
GROWTH = Growth(
    replace(BRANCHES, **QUICK),
    replace(ENCODER, **QUICK | {"learning_rate": 1e-3}),
    {"conv_kernel_size": 7},
)


class Killed(Exception):
    """What stops a run."""


@pytest.fixture(scope="module")
def pair(tiny_en: Any) -> tuple[Any, Any]:
    network = small_whisper(vocabulary=51864)
    network.generation_config = copy.deepcopy(tiny_en[0].generation_config)
    return network, tiny_en[1]


@pytest.fixture(scope="module")
def spoken() -> list[Utterance]:
    draw = np.random.default_rng(0)
    clips = [draw.normal(0, 0.1, 12000 + 3000 * i).astype(np.float32) for i in range(3)]
    return utterances_of([(clip, f"Some words, {i} of them.") for i, clip in enumerate(clips)])


def changed(before: Any, after: Any) -> set[str]:
    """Names of the parameters of both that are no longer the same."""
    old = dict(before.named_parameters())
    new = after.named_parameters()
    return {name for name, value in new if name in old and not torch.equal(value, old[name])}


@pytest.fixture(scope="module")
def grown(pair: Any, spoken: list[Utterance]) -> Any:
    model, reports = grow_conformer(*pair, spoken, GROWTH)
    assert [report.steps for report in reports] == [3, 3]
    return model


def test_branches_first_then_the_encoder(pair: Any, spoken: list[Utterance], grown: Any) -> None:
    no_encoder = replace(GROWTH, encoder=replace(GROWTH.encoder, epochs=0))
    first, _ = grow_conformer(*pair, spoken, no_encoder)
    assert not changed(pair[0], first)
    branches = new_branches(first)
    assert all(value.any() for value in branches.values())
    moved = changed(pair[0], grown)
    assert moved and all(name.startswith("model.encoder.") for name in moved)
    assert "model.encoder.embed_positions.weight" not in moved
    assert branches.keys() <= changed(first, grown)
    assert isinstance(grown, ConformerWhisper) and not grown.training
    assert margin_of(grown) == 1.0 and margin_of(pair[0]) is None


def test_so_much_is_kept_of_what_was_learnt(pair: Any, spoken: list[Utterance]) -> None:
    kept = {
        share: grow_conformer(*pair, spoken, replace(GROWTH, share=share))[0]
        for share in (0.0, 0.5, 1.0)
    }
    assert not changed(pair[0], kept[0.0])
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    asked = {"input_features": features, "decoder_input_ids": torch.tensor([[1, 2]])}
    with torch.no_grad():
        assert torch.equal(kept[0.0](**asked).logits, pair[0](**asked).logits)
    for name in ("layers.0.fc1.weight", "layers.0.conv_module.pointwise_out.weight"):
        none, half, whole = (
            kept[share].get_parameter(f"model.encoder.{name}") for share in (0.0, 0.5, 1.0)
        )
        torch.testing.assert_close(half, (none + whole) / 2)
        assert not torch.equal(none, whole)


def test_a_killed_growth_goes_on(
    pair: Any, spoken: list[Utterance], grown: Any, tmp_path: Path
) -> None:
    path, steps = tmp_path / "run", []

    def kill(done: int, total: int, loss: float) -> None:
        steps.append(done)
        if len(steps) in (2, 5):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            grow_conformer(*pair, spoken, GROWTH, checkpoint=path, on_step=kill)
    again, _ = grow_conformer(*pair, spoken, GROWTH, checkpoint=path, on_step=kill)
    assert steps == [1, 2, 3, 1, 2, 3]
    assert not changed(grown, again)
    assert [file.name for file in checkpoints(path)] == [
        "run.1",
        "run.2",
        "run.teacher.safetensors",
    ]


def test_the_whisper_teaches(pair: Any, spoken: list[Utterance]) -> None:
    asked: list[tuple[int, int]] = []
    alone = replace(GROWTH, encoder=replace(GROWTH.encoder, teacher=0.0))
    for growth, heard in ((GROWTH, [(1, 3), (2, 3), (3, 3)]), (alone, [])):
        asked.clear()
        grow_conformer(
            *pair, spoken, growth, control=True, on_taught=lambda *count: asked.append(count)
        )
        assert asked == heard


def test_the_style_is_heard_in_shorter_windows(pair: Any, spoken: list[Utterance]) -> None:
    bare = [replace(utterance, text="WHAT IS SAID") for utterance in spoken]
    heard: set[float | None] = set()
    taught: set[float | None] = set()
    grow_conformer(
        *pair,
        bare,
        GROWTH,
        on_heard=lambda *_: heard.add(margin_of(pair[0])),
        on_taught=lambda *_: taught.add(margin_of(pair[0])),
    )
    assert (heard, taught) == ({QUANTISED_MARGIN}, {None})
    assert "window_margin" not in pair[0].config.to_dict()


def test_the_control_is_a_whisper_whose_encoder_learnt(pair: Any, spoken: list[Utterance]) -> None:
    control, (report,) = grow_conformer(*pair, spoken, GROWTH, control=True)
    assert report.steps == 6 and type(control) is type(pair[0])
    assert margin_of(control) == 1.0
    moved = changed(pair[0], control)
    assert moved and all(name.startswith("model.encoder.") for name in moved)


def test_what_cannot_grow(pair: Any, spoken: list[Utterance]) -> None:
    with pytest.raises(SAMLError, match="no utterances"):
        grow_conformer(*pair, [])
    with pytest.raises(SAMLError, match="share of 6"):
        grow_conformer(*pair, spoken, replace(GROWTH, share=6))
    with pytest.raises(SAMLError, match="from a Whisper at full precision"):
        grow_conformer(small_conformer_whisper(), pair[1], spoken)


def test_the_command(pair: Any, tmp_path: Path) -> None:
    for part in pair:
        part.save_pretrained(tmp_path / "whisper")
    rows = []
    for i, speaker in enumerate(("ann", "ann", "bob")):
        file = tmp_path / f"{i}.wav"
        soundfile.write(file, np.random.default_rng(i).normal(0, 0.1, 12000), 16000)
        rows.append({"audio": str(file), "text": "Some words.", "speaker": speaker})
    data, out = tmp_path / "voices.jsonl", tmp_path / "grown"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *("grow-conformer", "--model", tmp_path / "whisper", "--data", data, "--out", out),
        *("--exclude-speakers", "bob", "--kernel", 5, "--epochs", 1, "--encoder-epochs", 1),
    ]

    def run() -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    result = run()
    assert result.exit_code == 0, (result.output, result.exception)
    assert "1 steps: loss" in result.stdout and f"written: {out}" in result.stdout
    model, _ = load_model(out)
    assert isinstance(model, ConformerWhisper) and model.config.conv_kernel_size == 5
    assert margin_of(model) == 2.0
    assert not checkpoints(tmp_path / "grown.checkpoint")
    again = run()
    assert again.exit_code == 2 and "is there already" in again.stderr
