"""Captures without a GPU: on which device, what a graph keeps, what a failed one leaves behind."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from saml_kernels.cuda import capture, keep

CPU = torch.device("cpu")


@pytest.mark.parametrize("ends", [False, True])
def test_a_failed_capture_leaves_nothing_behind(ends, fake_graphs, monkeypatch):
    """The stream is the one before, and the allocator is out of the capture."""
    told = fake_graphs.told

    def end(*where):
        told.append(("end", *where))
        if ends:  # the capture did that itself
            raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda *where: told.append(("release", *where))
    )

    def run():
        raise ValueError("cannot be captured")

    with pytest.raises(ValueError, match="cannot be captured"):
        capture(run, CPU)
    released = [] if ends else [("release", 1, (0, 7))]
    assert told == [fake_graphs.before, ("end", 1, (0, 7)), *released]
    assert not keep(torch.zeros(1))


def test_a_graph_keeps_what_it_is_given(fake_graphs):
    given = []

    def run():
        tensor = torch.zeros(1)
        given.append(weakref.ref(tensor.untyped_storage()))
        assert keep(tensor[:0])
        return 7

    result, replay = capture(run, CPU)
    gc.collect()
    assert result == 7 and given[0]() is not None
    replay()
    del replay
    gc.collect()
    assert given[0]() is None


def test_a_capture_is_one_of_its_device(fake_graphs, monkeypatch):
    """The current device need not be the model's."""
    now = []

    @contextmanager
    def device(where):
        now.append(str(where))
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "graph", lambda *given, **how: device(f"graph on {now[-1]}"))
    assert capture(lambda: list(now), torch.device("cuda:1"))[0] == ["cuda:1", "graph on cuda:1"]
    assert now == []
