"""What the layers of a model hear, and experts that start from it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from synthetic import small_whisper

from saml_kernels import SAMLConfig, SAMLLinear
from saml_models.compress.apply import apply_saml
from saml_models.models.registry import bind
from saml_models.training.batches import Sample
from saml_models.training.calibration import input_moments, start_experts
from saml_models.training.options import TrainingOptions

OPTIONS = TrainingOptions(max_batch=2, margins=(0.5,))


def clips() -> list[Sample]:
    random = np.random.default_rng(0)
    noise = [random.normal(0, 0.1, 16000 + 800 * i).astype(np.float32) for i in range(3)]
    return [Sample(lambda clip=clip: clip, len(clip) / 16000, "Some words.") for clip in noise]


def test_moments_are_those_of_the_inputs(tiny_en: Any) -> None:
    model, seen = small_whisper(vocabulary=51864), []
    layer = model.model.encoder.layers[0].fc1
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    moments = input_moments(bind(model, tiny_en[1]), clips(), OPTIONS)
    hook.remove()
    x = torch.cat([part.reshape(-1, 64) for part in seen])
    torch.testing.assert_close(
        moments["model.encoder.layers.0.fc1"], x.T @ x / len(x), rtol=1e-4, atol=1e-5
    )
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(moments) == linear
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_clips_are_heard_as_they_are(tiny_en: Any) -> None:
    speech = bind(small_whisper(vocabulary=51864), tiny_en[1])
    plain = input_moments(speech, clips(), OPTIONS)
    changed = replace(OPTIONS, noise=1.0, rooms=1.0, speeds=(0.9,), epochs=3)
    found = input_moments(speech, clips(), changed)
    assert all(torch.equal(found[name], moment) for name, moment in plain.items())


def test_outputs_start_nearer_to_those_of_the_original(tiny_en: Any) -> None:
    original, samples = small_whisper(vocabulary=51864), clips()
    moments = input_moments(bind(original, tiny_en[1]), samples, OPTIONS)
    model = copy.deepcopy(original)
    apply_saml(model, SAMLConfig(num_experts=2, rank=4))

    def error() -> dict[str, float]:
        found = {}
        for name, layer in model.named_modules():
            if isinstance(layer, SAMLLinear) and len(layer.lora_a):
                x = torch.linalg.cholesky(moments[name] + 1e-5 * torch.eye(len(moments[name]))).T
                wanted = x @ original.get_submodule(name).weight.T
                bias = 0 if layer.bias is None else layer.bias
                found[name] = float((layer(x) - bias - wanted).detach().norm())
        return found

    before = error()
    start_experts(model, original, moments)
    after = error()
    assert all(after[name] < before[name] for name in before)
