"""Short windows: the same network on fewer frames, and a full window changes nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import small_whisper

from saml_models.data.audio import load_audio
from saml_models.data.corpora import load_corpus
from saml_models.models.whisper.speech_model import WhisperSpeechModel
from saml_models.models.whisper.windows import (
    FULL_WINDOW,
    audio_mask,
    audio_window,
    log_mel,
    window_frames,
)
from saml_models.speakers.pretrained import load_adaptable
from saml_models.training.adapt import ADAPTATION, adapt
from saml_models.training.batches import IGNORED, BatchMaker, Sample
from saml_models.training.options import TrainingOptions
from saml_models.transcription.recordings import transcribe


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


def test_every_clip_of_a_batch_learns_to_end(tiny_en: Any) -> None:
    """Clips of many lengths, and texts of many: the last target of each is the end."""
    _, processor = tiny_en
    texts = ["Yes.", "One two three four five six seven eight nine ten.", "No, no."]
    samples = [
        Sample(partial(noise, seconds), seconds, text)
        for seconds, text in zip((0.4, 9.0, 2.5), texts, strict=True)
    ]
    make = BatchMaker(WhisperSpeechModel(*tiny_en), samples, TrainingOptions())
    made = make(0, [0, 1, 2])
    for row, text in enumerate(texts):
        learnt = made.targets[row][made.targets[row] != IGNORED].tolist()
        assert learnt[-1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(learnt[:-1]) == f" {text}"
        # What the decoder is given is what it is given when it decodes.
        assert made.inputs[row, :2].tolist() == list(processor.tokenizer.prefix_tokens)
    assert made.mask.sum(1).argsort().tolist() == [0, 2, 1]
    assert made.features.shape[-1] // 2 == made.mask.shape[1]


def test_short_clips_do_not_cost_a_model_its_times(speech_root: Path) -> None:
    """The cues of a recording before and after adaptation to clips of a few seconds."""
    network, processor = load_adaptable("tiny.en")
    own = sorted(
        load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"]),
        key=lambda u: len(u.load()),
    )
    recording = np.concatenate([u.load() for u in own[5:]])
    assert len(recording) > 30 * 16000
    before = transcribe(network, processor, recording).segments
    options = replace(ADAPTATION, epochs=1, learning_rate=1e-3)
    profile = adapt(network, processor, own[:4], options)
    after = transcribe(network, processor, recording, profile).segments
    assert len(before) >= 4 and abs(len(after) - len(before)) <= 2
    starts = np.array([cue.start for cue in before])
    near = [np.abs(starts - cue.start).min() < 1.0 for cue in after]
    assert np.mean(near) >= 0.7
    for one, other in pairwise(after):
        assert one.start < one.end <= other.start + 0.01
    assert after[-1].end == pytest.approx(before[-1].end, abs=1.0)
    clip = own[8].load()[: 16000 * 10]  # a short window: silence after it is no cue
    assert transcribe(network, processor, clip, profile).segments[-1].end <= len(clip) / 16000
