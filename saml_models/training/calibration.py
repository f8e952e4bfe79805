"""What a layer's inputs look like on real speech, and experts that start from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saml_kernels import SAMLLinear
from saml_models.compress.layers import compression_of
from saml_models.models.interface import SpeechModel
from saml_models.training.batches import BatchMaker, Sample, plan_batches
from saml_models.training.options import TrainingOptions

__all__ = ["input_moments", "start_experts", "starts_from_error"]

CLIPS = 96


def starts_from_error(model: nn.Module) -> bool:
    """Whether `start_experts` serves a model: plainly rounded, its experts not to start as a LoRA.

    What is left of a calibrated layer's error is not for a correction of that layer alone: it makes
    good what layers before it do.
    """
    saml = compression_of(model)
    return saml.calibration is None and saml.config.expert_init != "lora"


@torch.no_grad()
def input_moments(
    speech: SpeechModel,
    samples: Sequence[Sample],
    options: TrainingOptions,
) -> dict[str, Tensor]:
    """E[x x^T] of the inputs x of every linear layer and pointwise convolution.

    Args:
        speech: at full precision.
        samples: with their text, of which `CLIPS` are heard, as they are.
        options: say how they are batched, and the seed of which are taken.

    Returns:
        float32 [K, K] by the layer's name.
    """
    chosen = random.Random(options.seed).sample(list(samples), min(CLIPS, len(samples)))
    plain = replace(
        options, epochs=1, speeds=(1.0,), freq_masks=0, time_masks=0, noise=0.0, rooms=0.0
    )
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].transpose(1, 2) if isinstance(module, nn.Conv1d) else args[0]
        x = x.reshape(-1, x.shape[-1]).float()
        rows[name] = rows.get(name, 0) + len(x)
        moment = (x.T @ x).double()
        sums[name] = sums[name] + moment if name in sums else moment

    hooks = [
        module.register_forward_pre_hook(partial(add, name))
        for name, module in speech.network.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv1d) and module.kernel_size == (1,))
    ]
    make = BatchMaker(speech, chosen, plain)
    try:
        for step, batch in enumerate(plan_batches([s.seconds for s in chosen], plain)):
            there = make(step, batch).to(speech.device)
            speech.outputs(there.features, there.mask, there.inputs, there.kept)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / rows[name]).float() for name, total in sums.items()}


def start_experts(model: nn.Module, original: nn.Module, moments: dict[str, Tensor]) -> None:
    """Start a model's experts where they undo most of what rounding did to its layers' outputs.

    Args:
        model: treated by `apply_saml`.
        original: the same at full precision.
        moments: from `input_moments` of `original`.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, SAMLLinear) or not len(layer.lora_a):
            continue
        source = name if name in moments else name.removesuffix(".linear")
        weight: Any = original.get_submodule(source).weight
        layer.start_at_quantisation_error(
            weight.detach().reshape(layer.out_features, -1), moments[source]
        )
