"""A pass over a clip and a text that is taken to be its transcript."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from saml_models.models.interface import Clip, margin_of
from saml_models.models.registry import family_of

__all__ = ["Confidence", "confidence"]


@dataclass(frozen=True)
class Confidence:
    """How sure a model is of a text: means over its tokens, in nats.

    Attributes:
        log_prob: of the text's own tokens; 0 is certainty.
        entropy: of the distributions that they were drawn from; 0 is certainty.
    """

    log_prob: float
    entropy: float


@torch.inference_mode()
def confidence(model: Any, processor: Any, clip: Clip, text: str) -> Confidence:
    """Of a model in a text for a clip (float32 [samples] at 16 kHz, at most 30 s)."""
    family = family_of(model)
    routing = getattr(model, "saml_routing", None)
    prepared = family.prepare(processor, clip)
    features, mask = family.collate(processor, [prepared], margin_of(model))
    language = family.prompt_language(model, processor, [clip])
    ids, prompt = family.token_ids(processor, text, language)
    inputs = torch.tensor([ids[:-1]], device=model.device)
    kept = torch.arange(prompt - 1, inputs.shape[1], device=model.device)
    mask = mask.to(model.device)
    if routing is not None:
        routing.mask = family.routing_mask(model, mask)
    try:
        features = features.to(model.device, model.dtype)
        logits = family.outputs(model, features, mask, inputs, kept).logits
    finally:
        if routing is not None:
            routing.mask = None
    found = logits.log_softmax(-1)
    own = found.gather(-1, torch.tensor(ids[prompt:], device=model.device).unsqueeze(-1))
    return Confidence(float(own.mean()), float(-(found.exp() * found).sum(-1).mean()))
