"""Choosing among the epochs of a training by clips that it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saml_models.compress.layers import compression_of
from saml_models.models.interface import SpeechModel
from saml_models.training.batches import Sample
from saml_models.training.options import TrainingOptions

__all__ = ["BestEpoch"]


class BestEpoch:
    """The weights after the epoch that finds most of some texts' tokens likeliest.

    SAML's authors choose so (whisper/script/librispeech/train_whisper_moe.py of the repository of
    arXiv 2406.19706): the token accuracy, each token given those before it.
    """

    def __init__(
        self, speech: SpeechModel, samples: Sequence[Sample], options: TrainingOptions
    ) -> None:
        """Look at `samples` in the windows that `options` train in."""
        self.speech, self.samples = speech, samples
        self.margin = max(options.margins)
        self.right = -1
        self.weights: list[Tensor] = []

    @torch.no_grad()
    def look(self) -> None:
        """Keep the model's weights if no earlier ones were as good."""
        right = 0
        with self.speech.evaluating():
            for sample in self.samples:
                tokens, prompt = self.speech.token_ids(sample.text, sample.language)
                logits = self.speech.text_logits(sample.load(), tokens, prompt, self.margin)
                wanted = torch.tensor(tokens[prompt:], device=logits.device)
                right += int((logits.argmax(dim=-1) == wanted).sum())
        if right > self.right:
            self.right = right
            self.weights = [value.detach().clone() for value in self._learnt()]

    @torch.no_grad()
    def take(self) -> None:
        """Give the model the weights that were kept, as they are stored."""
        for value, kept in zip(self._learnt(), self.weights, strict=True):
            value.copy_(kept)
        compression_of(self.speech.network).round_experts()

    def _learnt(self) -> list[Tensor]:
        """Experts, routers, and the offsets of gates."""
        saml = compression_of(self.speech.network)
        offsets = [router.offset for router in saml.routers.values()]
        return [*saml.experts().values(), *(one for one in offsets if one is not None)]
