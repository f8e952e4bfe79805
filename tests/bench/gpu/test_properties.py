"""Properties of `bench gpu` on a CPU, and how they are asked."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import instruments, properties, property_runs
from bench.place import NOT_RUN

CPU = torch.device("cpu")
pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["rounding", "profiles", "decoding"])
def test_properties_hold_on_a_cpu(name):
    code, said = property_runs.check_property(name, CPU)
    assert code == 0 and said


def test_a_property_that_does_not_hold_is_told(monkeypatch):
    """Each compares what it must: spoiled, it fails."""
    from saml_models.compress import rounding_file
    from saml_models.speakers import mixing

    read, mixed = rounding_file.read_rounding, mixing.mixed_batch

    def spoiled(*given):
        found = read(*given)
        found.weights["model.encoder.layers.0.fc1"].codes[5] ^= 1
        return found

    monkeypatch.setattr(rounding_file, "read_rounding", spoiled)
    with pytest.raises(AssertionError, match=r"fc1.*: other codes than the file's"):
        properties.rounding(CPU)
    monkeypatch.setattr(mixing, "mixed_batch", lambda m, speakers: mixed(m, speakers[::-1]))
    with pytest.raises(AssertionError, match="clip 1 is off by"):
        properties.profiles(CPU)
    with pytest.raises(AssertionError, match="in a row"):
        wrong = torch.ones(400, 4)
        wrong[3] = 1.5
        instruments.near("y", wrong, torch.ones(400, 4), 0.05)
    with pytest.raises(AssertionError, match="y is off by inf"):
        instruments.near("y", torch.full((2, 2), float("nan")), torch.ones(2, 2), 1.0)


def test_properties_are_asked_side_by_side(monkeypatch):
    answers = {
        "counters": (0, "30 graphs\n", ""), "autocast": (1, "", "Traceback\nAssertionError: dx"),
        "network": (NOT_RUN, "needs a CUDA device\n", ""), "training": None,
    }  # fmt: skip

    def run(call, timeout, **how):
        answer = answers[call[call.index("--step") + 1].removeprefix("property-")]
        if answer is None:
            raise subprocess.TimeoutExpired(call, timeout)
        return SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), answer, strict=True)))

    kept = {name: properties.PROPERTIES[name] for name in answers}
    monkeypatch.setattr(property_runs, "PROPERTIES", kept)
    monkeypatch.setattr(property_runs.subprocess, "run", run)
    puts = []
    said = property_runs.check_properties(CPU, 50.0, lambda found: puts.append(len(found)))
    assert said.startswith("failed: 1 failed, 1 unfinished, 1 not run, 1 passed; autocast: Asser")
    assert "training unfinished after 50 s" in said and puts == [1, 2, 3, 4]
