"""How far a model's distribution over the next token is from another's, given the right text.

Kullback-Leibler divergence and agreement vary from clip to clip far less than word errors do: a
hundred clips tell two ways of rounding apart that a thousand words do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_models.models.interface import Clip, SpeechModel
from saml_models.text.wer import over_speakers

__all__ = ["Divergence", "divergences"]


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

    def interval(self, speakers: Sequence[str]) -> tuple[float, float]:
        """95 % of `mean`, over `speakers`, who are given for each clip."""
        _, low, high = over_speakers(speakers, self.kl, self.tokens)
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kl": self.kl, "tokens": self.tokens, "agreed": self.agreed}


@torch.inference_mode()
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
        full = reference.text_logits(clip, tokens, prompt, margin)
        for model, own in zip(models, found, strict=True):
            own.add(full, model.text_logits(clip, tokens, prompt, margin))
        if on_done:
            on_done(1)
    return found
