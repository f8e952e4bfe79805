"""How far a model's distribution over the next token is from another's, given the right text.

Kullback-Leibler divergence and agreement vary from clip to clip far less than word errors do: a
hundred clips tell two ways of rounding apart that a thousand words do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_models.models.interface import Clip, SpeechModel

__all__ = ["Divergence", "divergences", "text_logits"]


@dataclass
class Divergence:
    """Of each clip, in order.

    Attributes:
        kl: KL(reference || model), nats, summed over the text's tokens.
        tokens: how many those are, the end among them.
        agreed: of those, where both find the same token likeliest.
    """

    kl: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)

    def add(self, reference: Tensor, model: Tensor) -> None:
        """A clip, by the logits [T, V] of its text."""
        full, other = reference.log_softmax(dim=-1), model.log_softmax(dim=-1)
        self.kl.append(round(float((full.exp() * (full - other)).sum()), 6))
        self.tokens.append(len(full))
        self.agreed.append(int((full.argmax(dim=-1) == other.argmax(dim=-1)).sum()))

    @property
    def mean(self) -> float:
        """Nats a token."""
        return sum(self.kl) / sum(self.tokens)

    @property
    def agreement(self) -> float:
        """Share of the tokens, 0 to 1."""
        return sum(self.agreed) / sum(self.tokens)

    def interval(
        self, speakers: Sequence[str], samples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """95 % of `mean`, speakers drawn with replacement with all that they say.

        Args:
            speakers: of each clip.
            samples, seed: of the bootstrap.
        """
        names = {name: i for i, name in enumerate(dict.fromkeys(speakers))}
        table = np.zeros((len(names), 2))
        for name, kl, tokens in zip(speakers, self.kl, self.tokens, strict=True):
            table[names[name]] += kl, tokens
        drawn = np.random.default_rng(seed).integers(len(table), size=(samples, len(table)))
        sums = table[drawn].sum(axis=1)
        low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kl": self.kl, "tokens": self.tokens, "agreed": self.agreed}


@torch.inference_mode()
def text_logits(
    speech: SpeechModel, clip: Clip, tokens: Sequence[int], prompt: int, margin: float | None
) -> Tensor:
    """What a model expects at each token of a text: float32 [T, V].

    Args:
        speech: in evaluation mode.
        clip: up to 30 s.
        tokens, prompt: from `SpeechModel.token_ids`.
        margin: seconds of silence after the clip; None is the model's whole window.
    """
    features, mask = speech.collate([speech.prepare(clip)], margin)
    features, mask = features.to(speech.device, speech.dtype), mask.to(speech.device)
    inputs = torch.tensor([list(tokens[:-1])], device=speech.device)
    kept = torch.arange(prompt - 1, len(tokens) - 1, device=speech.device)
    with speech.context.batch(speech.encoder_mask(mask)):
        return speech.outputs(features, mask, inputs, kept).logits


def divergences(
    reference: SpeechModel,
    models: Sequence[SpeechModel],
    clips: Sequence[Clip],
    texts: Sequence[str],
    *,
    margin: float | None = None,
    language: str | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Divergence]:
    """Of several models from one, all in the same window.

    Args:
        reference: usually the same model at full precision.
        models: with its tokens.
        clips: each of at most 30 s.
        texts: what is said, as the reference would write it.
        margin: seconds of silence after a clip; None is the whole window.
        language: of the prompts, as `prompt_language` gives it.
        on_done: called with the number of clips done.

    Raises:
        SAMLError: no clips.
    """
    if not clips:
        raise SAMLError("divergence: no clips; give speech with its text")
    found = [Divergence() for _ in models]
    for clip, text in zip(clips, texts, strict=True):
        tokens, prompt = reference.token_ids(text, language)
        full = text_logits(reference, clip, tokens, prompt, margin)
        for model, own in zip(models, found, strict=True):
            own.add(full, text_logits(model, clip, tokens, prompt, margin))
        if on_done:
            on_done(1)
    return found
