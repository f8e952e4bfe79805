"""Short windows: the same network on fewer frames, and a full window changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import small_whisper

from saml_models.audio import load_audio
from saml_models.window import FULL_WINDOW, audio_mask, audio_window, log_mel, window_frames


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)


@pytest.fixture(scope="module")
def speech(speech_root: Path) -> np.ndarray:
    return load_audio(next(speech_root.glob("LibriSpeech/test-other/*/*/*.flac")))


def test_frames() -> None:
    assert window_frames(16000) == 200
    assert window_frames(16000, margin=0.0) == 100
    assert window_frames(16001, margin=0.0) == 150
    assert window_frames(30 * 16000) == FULL_WINDOW
    assert window_frames(90 * 16000) == FULL_WINDOW


def test_full_features_are_the_feature_extractors(tiny_en: Any, speech: np.ndarray) -> None:
    processor = tiny_en[1]
    theirs = processor(speech, sampling_rate=16000, return_tensors="pt").input_features
    assert torch.equal(log_mel(processor, [speech], FULL_WINDOW), theirs)


def test_short_features_are_the_beginning_of_the_full_ones(tiny_en: Any) -> None:
    processor = tiny_en[1]
    clip = noise(2.0)
    full, short = log_mel(processor, [clip], FULL_WINDOW), log_mel(processor, [clip], 300)
    assert short.shape == (1, 80, 300)
    torch.testing.assert_close(short[..., :190], full[..., :190])
    assert log_mel(processor, [noise(9.0)], 300).shape == (1, 80, 300)


@torch.no_grad()
def test_a_full_window_is_the_models_own_forward(tiny_en: Any, speech: np.ndarray) -> None:
    model, processor = tiny_en
    features = log_mel(processor, [speech], FULL_WINDOW)
    theirs = model.model.encoder(features).last_hidden_state
    with audio_window(model, FULL_WINDOW):
        assert torch.equal(model.model.encoder(features).last_hidden_state, theirs)


@torch.no_grad()
def test_a_short_window_is_a_model_of_that_length() -> None:
    model, features = small_whisper(), torch.randn(2, 80, 300)
    short = small_whisper()
    short.model.encoder.embed_positions = torch.nn.Embedding.from_pretrained(
        model.model.encoder.embed_positions.weight[:150]
    )
    short.config.max_source_positions = 150
    with audio_window(model, 300):
        ours = model.model.encoder(features).last_hidden_state
    assert torch.equal(ours, short.model.encoder(features).last_hidden_state)


def test_everything_is_put_back() -> None:
    model = small_whisper()
    table = model.model.encoder.embed_positions
    for _ in range(2):
        with pytest.raises(KeyError), audio_window(model, 300):
            assert model.config.max_source_positions == 150
            raise KeyError
        assert model.config.max_source_positions == 1500
        assert model.model.encoder.embed_positions is table


def test_mask_is_true_where_there_is_audio() -> None:
    mask = audio_mask([16000, 8000, 0], 200)
    assert mask.shape == (3, 100)
    assert mask.sum(1).tolist() == [50, 25, 1]
    assert mask[0, :50].all()
