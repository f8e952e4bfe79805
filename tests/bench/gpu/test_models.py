"""Whole models of `bench gpu` on a CPU."""

import json
import warnings
from importlib import import_module

import pytest
import torch

from bench.gpu import models, results

CPU = torch.device("cpu")
pytest.importorskip("triton")


def test_a_model_with_random_weights_does_without_a_folder():
    model, processor = models.Place(None, CPU, models.SMALL).quantised()
    assert processor is None and model.config.d_model == 512 and len(model.saml.layers) > 90
    assert not model.saml.weights["model.encoder.layers.0.fc1.weight"].codes.is_meta


def test_tokens_are_timed_without_saying_loops_again(model_folder):
    """Of noise, texts that never end are loops; `greedy` would say each again, six times over."""
    model, _ = models.Place(model_folder, CPU, models.SMALL).quantised()
    ends = model.generation_config.eos_token_id
    model.generation_config.suppress_tokens = [ends]
    window = (torch.randn(2, 80, 3000), torch.ones(2, 1500, dtype=torch.bool))
    steps = []
    from saml_models.models.whisper import greedy

    before = greedy.Step.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy.Step, "__call__", lambda *given: steps.append(1) or before(*given))
        models.decode(model, window, 20)
    assert len(steps) == 20


def test_a_part_that_fails_or_takes_too_long_leaves_the_others(tmp_path):
    def late(place):
        raise TimeoutError("not done in 20 s")

    def fail(place):
        raise ValueError("no such layer\nat all")

    parts = {"slow": late, "bad": fail, "good": lambda place: {"seconds": 2}}

    def alone(place):
        warnings.warn("training goes on without CUDA graphs: it waits", stacklevel=2)
        warnings.warn("something else", stacklevel=2)
        return {"seconds": 2}

    sheet, place = results.Sheet(tmp_path, "models", CPU), models.Place(tmp_path, CPU, None)
    said = models.measure({"alone": alone}, place, sheet, 600.0)
    assert said == "alone seconds 2; failed: training goes on without CUDA graphs: it waits"
    said = models.measure({"bare": lambda place: import_module("soundfiles")}, place, sheet, 9.0)
    assert said == "bare not run: ModuleNotFoundError: No module named 'soundfiles'"
    said = models.measure(parts, place, sheet, 600.0)
    assert said == (
        "slow failed: TimeoutError: not done in 20 s; bad failed: ValueError: no such layer; "
        "good seconds 2"
    )
    found = json.loads((tmp_path / results.FILE).read_text())["models"]
    assert found["good"] == {"seconds": 2} and found["bad"]["failed"] == "ValueError: no such layer"
    said = models.measure(parts, place, sheet, 0.5)
    assert said.count("no time is left") == 3
