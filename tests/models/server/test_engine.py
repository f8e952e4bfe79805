"""The engine: who waits is decoded together, who leaves frees the place, a full queue says so."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import CancelledError
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from serving import Talker, noise, said

from saml_kernels import SAMLError
from saml_models.models.interface import DecodingOptions
from saml_models.server.engine import Engine, EngineClosed, QueueFull

PLAIN = DecodingOptions("en", timestamps=False)
TIMED = DecodingOptions("en")


def until(reached: Any) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_comes_at_once_is_decoded_together() -> None:
    talker = Talker()
    talker.gate.clear()  # the first batch is heard until the others are there
    with Engine(talker, max_batch=4, patience=60) as engine:  # type: ignore[arg-type]
        jobs = [engine.submit(noise(n % 3 + 1), None, PLAIN) for n in range(8)]
        talker.gate.set()
        texts = [job.future.result(10).text for job in jobs]
    assert texts == [" ".join(said((n % 3 + 1) * 16000)) for n in range(8)]
    assert talker.batches == [4, 4] and engine.counts.recordings == 8
    assert engine.counts.audio == 15 and engine.waiting == 0
    with pytest.raises(EngineClosed, match="closed"):
        engine.submit(noise(1))
    with pytest.raises(EngineClosed):  # before a recording is decoded
        engine.check_room()


def test_a_full_queue_says_so_at_once_and_a_place_is_free_when_one_leaves() -> None:
    talker = Talker(pause=0.05)
    talker.gate.clear()
    with Engine(talker, max_queue=2, patience=0) as engine:  # type: ignore[arg-type]
        long = [engine.submit(noise(600), None, TIMED) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 recordings") as full:  # the model has no part in it
            engine.submit(noise(1), None, PLAIN)
        assert full.value.retry_after >= 1
        talker.gate.set()
        engine.cancel(long[0])
        assert engine.submit(noise(1), None, PLAIN).future.result(20).text == "word0"
        with pytest.raises(CancelledError):
            long[0].future.result(20)
        assert not long[1].future.done() and engine.counts.cancelled == 1
    with pytest.raises(EngineClosed):  # closed meanwhile
        long[1].future.result(20)


def test_a_short_one_comes_after_the_window_that_is_heard() -> None:
    talker = Talker()
    with Engine(talker, patience=0) as engine:  # type: ignore[arg-type]
        talker.gate.clear()
        long = engine.submit(noise(500), None, TIMED)
        until(lambda: talker.batches == [1])  # its first window
        numbers: list[int] = []
        short = engine.submit(noise(1), None, PLAIN)

        def done(_: object) -> None:  # in the model's thread
            numbers.append(len(talker.batches))
            talker.gate.clear()

        short.future.add_done_callback(done)
        talker.gate.set()
        assert short.future.result(20).text == "word0"
        until(lambda: numbers)
        assert numbers == [2] and not long.future.done()  # in the batch after that window
        engine.cancel(long)
        talker.gate.set()


def test_errors_are_the_recordings_own() -> None:
    talker = Talker()
    texts: list[str] = []
    with Engine(talker, patience=0) as engine:  # type: ignore[arg-type]
        assert engine.call(lambda: 7).result(5) == 7
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 // 0).result(5)
        bad = engine.submit(np.zeros((2, 2), np.float32), None, TIMED)
        good = engine.submit(noise(12), None, TIMED, on_text=texts.append)
        assert good.future.result(5).text == texts[-1] == " ".join(said(12 * 16000))
        assert len(texts) == 4 and all(b.startswith(a) for a, b in pairwise(texts))
        bad.future.exception(5)
        assert engine.is_alive
    with pytest.raises(SAMLError, match="max_batch"):
        Engine(talker, max_batch=0)  # type: ignore[arg-type]


def test_a_full_queue_is_told_across_processes() -> None:
    found = pickle.loads(pickle.dumps(QueueFull(3, 1.5)))
    assert found.retry_after == 1.5 and str(found).startswith("3 recordings are waiting")
