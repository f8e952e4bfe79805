"""A pass over a clip and a text that is taken to be its transcript."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saml_models.models.interface import Clip, SpeechModel

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
def confidence(
    speech: SpeechModel, clip: Clip, text: str, language: str | None = None
) -> Confidence:
    """Of a model in a text for a clip (float32 [samples] at 16 kHz, at most 30 s).

    `language` is as `prompt_language` gives it; None asks that of this clip.
    """
    ids, prompt = speech.token_ids(text, language or speech.prompt_language([clip]))
    log_probs = speech.text_logits(clip, ids, prompt, speech.margin).log_softmax(-1)
    own = log_probs.gather(-1, torch.tensor(ids[prompt:], device=speech.device).unsqueeze(-1))
    return Confidence(float(own.mean()), float(-(log_probs.exp() * log_probs).sum(-1).mean()))
