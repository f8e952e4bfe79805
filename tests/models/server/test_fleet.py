"""Replicas of Ray Serve answer as the engine does; where Ray is installed."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError
from unittest.mock import MagicMock

import numpy as np
import pytest
import small_voices

from saml_kernels import SAMLError
from saml_models.models.interface import DecodingOptions
from saml_models.server.engine import EngineClosed, QueueFull
from saml_models.server.fleet import RayEngine, Replica
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile

TIMED = DecodingOptions("en")


@pytest.mark.slow
def test_replicas_answer_as_the_engine_does() -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    profile = SpeakerProfile.of(load_adaptable("tiny.en")[0], speaker="ann")
    with RayEngine("tiny.en", None, "cpu", max_queue=2) as engine:
        assert engine.language_code("english") == "en"
        with pytest.raises(SAMLError, match="klingon"):
            engine.language_code("klingon")
        silence = np.zeros(16000, np.float32)
        found = engine.submit(silence, profile, TIMED).future.result(120)
        assert (found.text, found.duration, found.speaker_hash) == ("", 1.0, profile.hash)
        noise = np.random.default_rng(0).normal(0, 0.1, 16000 * 600).astype(np.float32)
        jobs = [engine.submit(noise, None, TIMED) for _ in range(2)]
        with pytest.raises(QueueFull):
            engine.submit(silence)
        for job in jobs:
            engine.cancel(job)
        assert engine.submit(silence, None, TIMED).future.result(120).text == ""
        for job in jobs:
            with pytest.raises(CancelledError):
                job.future.result(30)
        assert engine.counts.cancelled == 2 and engine.waiting == 0


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(SAMLError, match=r"--engine ray.*saml-kernels\[ray\]"):
        RayEngine("tiny.en", None, "cpu")


def test_what_ray_cannot_store_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = MagicMock()
    ray.put.side_effect = RuntimeError("the object store is full")
    monkeypatch.setitem(__import__("sys").modules, "ray", ray)
    silence = np.zeros(16000, np.float32)
    with RayEngine("tiny.en", None, "cpu") as engine:
        job = engine.submit(silence, SpeakerProfile.of(small_voices.make()), TIMED)
        with pytest.raises(RuntimeError, match="store is full"):
            job.future.result(10)
        assert engine.waiting == 0 and engine.counts.failed == 1
    with pytest.raises(EngineClosed):
        engine.submit(silence)


def test_a_replica_keeps_one_object_for_a_speaker() -> None:
    replica = Replica("tiny.en", None, "cpu", 1, 1)
    try:
        network = replica.engine.speech.network
        one, two = (SpeakerProfile.of(network, speaker="ann") for _ in range(2))
        assert replica._same(one) is one and replica._same(two) is one
        assert replica._same(None) is None
        began = time.monotonic()
        assert replica.language_code("en") == "en" and time.monotonic() - began < 5
    finally:
        replica.engine.close()
