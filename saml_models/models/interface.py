"""Kinds of models: what features, tokens, decoding and files ask of one.

Whisper and the Conformer differ in what `Family` lists and in nothing else: surgery, training,
adaptation, evaluation and the command line are the same code for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from saml_models.text.transcript import Segment

__all__ = ["Family", "Outputs", "additive_mask", "causal_mask", "margin_of", "model_name"]

Clip = npt.NDArray[np.float32]  # [samples] at 16 kHz


@dataclass(frozen=True)
class Outputs:
    """What a model says in training: `logits` [n, V] float32 at the positions asked for.

    Where it has a CTC head, also `ctc` [B, T', V] float32 log-probabilities of the encoder's frames
    (token `blank` is none of the text's), `ctc_lengths` [B] of them holding audio.
    """

    logits: Tensor
    ctc: Tensor | None = None
    ctc_lengths: Tensor | None = None
    blank: int = 0


class Family(Protocol):
    """One kind of model. `model_type` is transformers' name for it, and the disk's."""

    model_type: str
    model_class: Any
    config_class: Any

    def prepare(self, processor: Any, clip: Clip) -> Tensor:
        """What can be made of one clip alone, before it joins a batch."""

    def frames(self, prepared: Tensor) -> int:
        """Spectrogram frames that hold a prepared clip's audio."""

    def collate(
        self, processor: Any, prepared: Sequence[Tensor], margin: float | None, step: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Features of a batch and a bool mask [B, frames], True where there is audio.

        Args:
            processor: of the model.
            prepared: by `prepare`.
            margin: seconds of silence after the longest clip, for models that hear padding; None
                is the model's whole window.
            step: spectrogram frames are a multiple of it, as far as the model takes so many.
        """

    def bands(self, features: Tensor) -> Tensor:
        """A view of features as [B, mel bins, frames]."""

    def prompt_language(self, model: Any, processor: Any, clips: Sequence[Clip]) -> str | None:
        """The code that the prompt of these clips' texts names: one for all; None names none."""

    def token_ids(
        self, processor: Any, text: str, language: str | None = None
    ) -> tuple[list[int], int]:
        """The decoder's whole sequence for a text, and how many tokens of it are the prompt.

        `language` is what `prompt_language` gave.
        """

    def outputs(
        self, model: Any, features: Tensor, mask: Tensor, inputs: Tensor, kept: Tensor
    ) -> Outputs:
        """A training pass.

        Args:
            model: plain, or with SAML layers.
            features, mask: as from `collate`.
            inputs: token ids [B, L].
            kept: int64 [n], the positions in [B * L] whose logits are wanted, in order.
        """

    def routing_mask(self, model: Any, mask: Tensor) -> Tensor:
        """The mask of `collate` at the encoder's frame rate: [B, T'] bool."""

    def hear(
        self,
        model: Any,
        processor: Any,
        clips: Sequence[Clip],
        beam_size: int,
        language: str | None,
    ) -> list[str]:
        """The text of clips that fit the model's window, decoded together."""

    def no_speech(self, model: Any, processor: Any, clip: Clip) -> float | None:
        """The probability that there is no speech in a clip of up to 30 s; None: it cannot say."""

    def language_code(self, model: Any, language: str | None, task: str) -> str | None:
        """The code of a language that `model` knows; None has to be detected.

        Raises:
            SAMLError: the model does not know the language or the task.
        """

    def detect_language(self, model: Any, processor: Any, clip: Clip) -> str:
        """The code of the language a clip is in."""

    def segments(
        self,
        model: Any,
        processor: Any,
        clip: Clip,
        language: str,
        *,
        task: str,
        beam_size: int,
        words: bool,
        on_progress: Callable[[float, float], None],
    ) -> tuple[str, list[Segment]]:
        """Text and segments of a recording of any length."""

    def computed(self, name: str) -> Callable[[torch.Size], Tensor] | None:
        """What gives a parameter's values by its shape, so that no file holds it; else None."""

    def extent(self, config: Any) -> tuple[int, int]:
        """Number of layers, and the largest table made without a file's bytes, that config asks."""

    def load_processor(self, folder: Path) -> Any:
        """The processor that was saved beside a model."""


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Of which keys are seen, bool [B, 1, L, T], what attention adds to its scores.

    Given a mask of two dimensions or none, transformers waits for the device to see what is in it.
    """
    hidden = torch.finfo(torch.float16).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, hidden)


def causal_mask(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of a decoder that is given whole texts [B, L]: [B, 1, L, L]."""
    rows, length = inputs.shape
    seen = torch.ones(length, length, dtype=torch.bool, device=inputs.device).tril()
    return additive_mask(seen, dtype).expand(rows, 1, -1, -1)


MARGIN = 1.0  # seconds of silence after a clip in a short window


def margin_of(model: nn.Module) -> float | None:
    """Seconds of silence after a clip that a model hears by itself; None is its whole window.

    One where its experts learnt that; else `saml_margin` (loading.py sets it on quantised models).
    """
    if getattr(model, "saml_short_windows", False):
        return MARGIN
    margin = getattr(model, "saml_margin", None)
    return None if margin is None else float(margin)


# Seconds of silence after a clip, for a quantised Whisper without experts that know short windows:
# base makes no more errors so than in 30 s (`python -m bench windows`).
MARGIN = 10.0


def model_name(model: Any) -> str:
    """What a model was loaded by; empty where nobody knows."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))
