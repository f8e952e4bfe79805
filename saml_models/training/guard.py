"""Whether what is learnt of a speaker helps with clips that it was not learnt from.

Half of the clips are learnt from with the options of the whole training, and the other half is
heard with the result and without it. Two things are compared: the loss of the held-back texts,
which says much of few clips, and the words that greedy decoding gets wrong, which shows what the
loss cannot: a text that runs into a loop. What is used in the end is learnt from all clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_models.compress.layers import compression_of
from saml_models.models.interface import SpeechModel
from saml_models.text.wer import pooled, word_errors
from saml_models.training.batches import Sample
from saml_models.training.loop import fit
from saml_models.training.objective import trained_parameters
from saml_models.training.options import TrainingOptions
from saml_models.transcription.clips import decode_clips

__all__ = ["LEAST", "Guard", "Verdict", "between", "halves"]

LEAST = 5  # clips
MOST = 20  # clips that are learnt from, and held back: more would only take longer
SHARES = (1.0, 0.5)  # of what was learnt that may be used, the most first
CHANCE = 0.05  # of the held-back words: as many more errors, but at least one, can be chance


@dataclass(frozen=True)
class Verdict:
    """What held-back clips say of a profile.

    Attributes:
        clips, tokens, words: that were held back.
        loss_before, loss_after: mean cross entropy of the tokens, in nats, unadapted and adapted.
        errors_before, errors_after: of the words, decoded greedily.
        share: of what was learnt, that is used: weights between the unadapted ones (0) and those
            learnt (1). What is said after is of this share; of 1 where nothing is used.
    """

    clips: int
    tokens: int
    words: int
    loss_before: float
    loss_after: float
    errors_before: int
    errors_after: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, and a profile's notes."""
        rounded = {key: round(value, 4) for key, value in vars(self).items()}
        return {key: rounded[key] for key in sorted(rounded)}

    @staticmethod
    def line(noted: Mapping[str, Any]) -> str:
        """One line for people, of what `to_dict` gave."""
        share = noted["share"]
        used = {1: "used", 0: "not used, the profile is the unadapted one"}
        end = used.get(share, f"used by {share:.0%}")
        return (
            f"guard: learnt from the others, {noted['clips']} held-back clips have a loss of "
            f"{noted['loss_after']:.3f} nats a token ({noted['loss_before']:.3f} before) and "
            f"{noted['errors_after']} of {noted['words']} words wrong ({noted['errors_before']} "
            f"before): {end}"
        )


def halves(count: int) -> tuple[list[int], list[int]]:
    """Which of so many clips are learnt from, and which are held back: every second one."""
    return list(range(0, count, 2))[:MOST], list(range(1, count, 2))[:MOST]


class Guard:
    """Hears held-back clips with the model as it is when this is made, and once it has learnt."""

    def __init__(
        self, speech: SpeechModel, samples: Sequence[Sample], unsure: Sequence[Sample] = ()
    ) -> None:
        """Take a speaker's clips.

        Args:
            speech: as it is before it learns.
            samples: with texts that are right.
            unsure: others, none of which is held back.

        Raises:
            SAMLError: they are fewer than `LEAST`.
        """
        if len(samples) < LEAST:
            raise SAMLError(f"guard: {len(samples)} clips; expected at least {LEAST}")
        learnt, held = halves(len(samples))
        self.speech = speech
        self.learnt = [*(samples[i] for i in learnt), *unsure]
        self.held = [samples[i] for i in held]
        self.before = self._losses(), self._errors()

    def check(
        self,
        options: TrainingOptions,
        checkpoint: Path | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> Verdict:
        """Learn from half of the clips, and judge; the model ends as it began.

        Args:
            options: of the training that is judged.
            checkpoint, on_step: as for `training.fit`.

        Returns:
            All of what was learnt is used where the held-back texts have become likelier, half of
            it where that makes them less likely by no more than the standard error over clips (what
            is learnt from all clips is better than this), and nothing else; each only where no more
            words are wrong than chance makes.
        """
        own = trained_parameters(self.speech.network)
        start = {name: tensor.detach().clone() for name, tensor in own.items()}
        losses_before, (errors_before, words) = self.before
        origin = compression_of(self.speech.network).experts_hash()
        fit(self.speech, self.learnt, options, checkpoint, on_step, origin=origin)
        end = {name: tensor.detach().clone() for name, tensor in own.items()}
        tokens = self._tokens()
        allowed = errors_before + max(1, int(CHANCE * words))
        found: dict[float, Verdict] = {}
        used = 0.0
        for share in SHARES:
            between(self.speech, own, start, end, share)
            losses = self._losses()
            errors, _ = self._errors()
            found[share] = Verdict(
                len(self.held), tokens, words,
                sum(losses_before) / tokens, sum(losses) / tokens, errors_before, errors, share,
            )  # fmt: skip
            rises = [after - was for was, after in zip(losses_before, losses, strict=True)]
            likelier = sum(rises) < 0 if share == 1 else sum(rises) <= standard_error(rises)
            if likelier and errors <= allowed:
                used = share
                break
        between(self.speech, own, start, end, 0.0)
        return replace(found[used or 1.0], share=used)

    def _tokens(self) -> int:
        given = (self.speech.token_ids(s.text, s.language) for s in self.held)
        return sum(len(ids) - prompt for ids, prompt in given)

    @torch.no_grad()
    def _losses(self) -> list[float]:
        """Nats of each clip's text."""
        found = []
        with self.speech.evaluating():
            for sample in self.held:
                ids, prompt = self.speech.token_ids(sample.text, sample.language)
                given = sample.load(), ids, prompt, self.speech.margin
                likely = self.speech.text_logits(*given).log_softmax(-1)
                own = torch.tensor(ids[prompt:], device=likely.device).unsqueeze(-1)
                found.append(-float(likely.gather(-1, own).sum()))
        return found

    def _errors(self) -> tuple[int, int]:
        """Wrong words, and all words."""
        clips = [sample.load() for sample in self.held]
        texts = decode_clips(self.speech, clips, language=self.held[0].language)
        found = pooled(word_errors([sample.text for sample in self.held], texts))
        return found.errors, found.words


def standard_error(values: Sequence[float]) -> float:
    """Of the sum of several values, as if others had been drawn."""
    return math.sqrt(len(values)) * stdev(values)


@torch.no_grad()
def between(
    speech: SpeechModel,
    own: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    share: float,
) -> None:
    """Put weights between two sets of them: `start` at share 0, `end` at 1, as they are stored."""
    for name, tensor in own.items():
        tensor.copy_(start[name] if share == 0 else torch.lerp(start[name], end[name], share))
    if 0 < share < 1:
        compression_of(speech.network).round_experts()
