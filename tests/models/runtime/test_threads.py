"""Fewer threads where other programs keep cores busy, and the user's number afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from saml_models.runtime import threads
from saml_models.runtime.threads import Sample, look, shared_cores
from saml_models.transcription import clips as decoding


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    """Four threads on four cores, whatever this machine has; nothing known about others yet."""
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(threads, "_last", Sample(0.0, 0.0, 0.0))
    monkeypatch.setattr(threads, "_free", float("inf"))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def others_take(monkeypatch, cores: float, own: float = 2.0) -> None:
    """From now on a second passes between two looks, in which others take `cores`."""

    def later() -> Sample:
        last = threads._last
        return Sample(last.at + 1.0, last.busy + own + cores, last.own + own)

    monkeypatch.setattr(threads, "sample", later)
    monkeypatch.setattr(threads, "PERIOD", -float("inf"))


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(0.0, 4), (0.3, 4), (0.4, 3), (1.0, 3), (1.2, 3), (2.0, 2), (3.0, 1), (4.0, 1), (-0.5, 4)],
)
def test_a_busy_core_costs_one_thread(monkeypatch, cores, expected):
    others_take(monkeypatch, cores)
    with shared_cores():
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 4


def test_it_follows_the_load_at_each_look_and_each_call_of_the_model(monkeypatch):
    model = torch.nn.Linear(2, 2)
    with shared_cores(model):
        for cores, expected in ((2.0, 2), (0.0, 4), (9.0, 1)):
            others_take(monkeypatch, cores)
            look()
            assert torch.get_num_threads() == expected
        others_take(monkeypatch, 1.0)
        model(torch.zeros(2))
        assert torch.get_num_threads() == 3
    others_take(monkeypatch, 3.0)
    model(torch.zeros(2))
    look()
    assert torch.get_num_threads() == 4, "outside of the block the user's number stands"


def test_never_more_than_the_user_chose(monkeypatch):
    torch.set_num_threads(2)
    for cores, expected in ((1.0, 2), (3.0, 1), (0.0, 2)):
        others_take(monkeypatch, cores)
        with shared_cores():
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 2


def test_blocks_within_blocks_and_errors_leave_the_number_alone(monkeypatch):
    others_take(monkeypatch, 2.0)
    with pytest.raises(RuntimeError, match="inside"), shared_cores():
        with shared_cores():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2, "the inner block gives nothing back"
        raise RuntimeError("inside")
    assert torch.get_num_threads() == 4
    with shared_cores():
        assert torch.get_num_threads() == 2


def test_each_thread_has_its_own_block(monkeypatch):
    others_take(monkeypatch, 2.0)
    seen = []
    with shared_cores():
        thread = threading.Thread(target=lambda: (look(), seen.append(threads._here.__dict__)))
        thread.start()
        thread.join()
    assert seen == [{}] and torch.get_num_threads() == 4


def test_clips_are_decoded_so(monkeypatch):
    seen = []

    class Speech:
        network = torch.nn.Linear(1, 1)
        evaluating = staticmethod(nullcontext)

        def decode(self, clips, beam_size, language, own_words=None):
            seen.append(torch.get_num_threads())
            others_take(monkeypatch, 2.0)
            return ["" for _ in clips]

        def no_speech(self, clip):
            return 0.0

    others_take(monkeypatch, 1.0)
    clips = [np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)] * 2
    decoding.decode_clips(Speech(), clips, batch_size=1)
    assert seen == [3, 2] and torch.get_num_threads() == 4


def test_where_the_kernel_does_not_say(monkeypatch, tmp_path):
    for missing in (tmp_path / "none", tmp_path):
        monkeypatch.setattr(threads, "STAT", missing)
        assert threads.sample() is None
    monkeypatch.setattr(threads, "_last", None)
    with shared_cores():
        assert torch.get_num_threads() == 4


def test_only_cores_that_we_may_use_count(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  900 0 0 0 0 0 0 0 0 0\n"
        "cpu1 100 20 30 4000 500 1 2 7 0 0\n"
        "cpu11 700 0 0 0 0 0 0 0 0 0\n"
        "intr 5 5\n"
    )
    monkeypatch.setattr(threads, "STAT", stat)
    found = threads.sample()
    assert found is not None
    assert found.busy == pytest.approx(160 / os.sysconf("SC_CLK_TCK"))


@pytest.mark.skipif(not threads.STAT.exists(), reason="no /proc/stat")
def test_a_busy_program_is_seen(monkeypatch):
    monkeypatch.undo()
    endless = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(endless) as other:
        try:
            time.sleep(0.3)  # Python starts
            before = threads.sample()
            time.sleep(1.0)
            after = threads.sample()
        finally:
            other.kill()
    assert before is not None and after is not None
    assert threads.others(before, after) > 0.3


def test_our_own_work_is_not_anothers():
    before = threads.sample()
    if before is None:
        pytest.skip("no /proc/stat")
    after = before._replace(at=before.at + 1, busy=before.busy + 2, own=before.own + 2)
    assert threads.others(before, after) == pytest.approx(0.0, abs=1e-9)
