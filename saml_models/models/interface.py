"""`SpeechModel`: what features, tokens, decoding and files ask of a recogniser.

Whisper and the Conformer differ in what it lists and in nothing else: compression, training,
adaptation, evaluation and the command line are the same code for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from saml_kernels.layers.context import BatchContext
from saml_models.data.audio import MAX_SECONDS
from saml_models.models.own_words import BONUS, OwnWords, variants
from saml_models.text.transcript import Segment

__all__ = [
    "DecodingOptions",
    "Outputs",
    "Piece",
    "SpeechModel",
    "additive_mask",
    "causal_mask",
    "context_of",
    "margin_of",
]

Clip = npt.NDArray[np.float32]  # [samples] at 16 kHz

SHORT_WINDOW_MARGIN = (
    1.0  # seconds of silence after a clip, where experts have learnt short windows
)
# The same of a quantised Whisper whose experts have not: base makes no more errors so than in
# 30 s (`python -m bench windows`).
QUANTISED_MARGIN = 10.0


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


@dataclass(frozen=True)
class DecodingOptions:
    """How a recording is decoded.

    Attributes:
        language: a code that `SpeechModel.language_code` gave; None has to be detected.
        task: "transcribe" or "translate".
        beam_size: 1 is greedy.
        timestamps: whether a clip that fits one window is divided into segments; a longer one is.
        words: whether words have times.
        prompt: text that comes before the recording, for its spelling and style.
        temperature: 0 takes the likeliest tokens.
        own_words: as `SpeechModel.own_words` makes them, that are likelier than the model thinks.
    """

    language: str | None = None
    task: str = "transcribe"
    beam_size: int = 1
    timestamps: bool = True
    words: bool = False
    prompt: str = ""
    temperature: float = 0.0
    own_words: OwnWords | None = None

    @property
    def plain(self) -> bool:
        """Whether a clip that fits one window needs nothing but its text."""
        timed = self.timestamps or self.words
        return not (timed or self.prompt or self.temperature) and self.task == "transcribe"


@dataclass(frozen=True)
class Piece:
    """What a recording asks its model next.

    Attributes:
        kind: "language", "plain" (text without times), "window" (with times), or "alone".
        clip: float32 [samples] at 16 kHz, up to 30 s but for "alone".
        language: a code; pieces of one language alone are decoded together, if they are plain.
        given: what the model needs besides.
    """

    kind: str
    clip: Clip
    language: str | None = None
    given: Any = None


Pieces = Generator[Piece, Any, tuple[str, list[Segment]]]
"""Pieces in turn, each answered by what was heard in it; then the whole text and its segments."""


class SpeechModel(ABC):
    """A network with its processor: made by `registry.bind`, once for each public call.

    Attributes:
        network: plain, or with SAML layers; ESPnet's too.
        processor: features and tokens of that network.
        model_type: transformers' name for the kind of network, and the disk's.
        network_class, config_class: of that kind; what files are read into.
    """

    model_type: ClassVar[str]
    network_class: ClassVar[Any]
    config_class: ClassVar[Any]

    def __init__(self, network: Any, processor: Any) -> None:
        self.network, self.processor = network, processor

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's parameters, and so of its features."""
        return self.network.dtype

    @property
    def context(self) -> BatchContext:
        """What the network's layers share while a batch runs; see `context_of`."""
        return context_of(self.network)

    @property
    def margin(self) -> float | None:
        """Seconds of silence after a clip that the network is given; see `margin_of`."""
        return margin_of(self.network)

    @property
    def name(self) -> str:
        """What the network was loaded by; empty where nobody knows."""
        return str(getattr(getattr(self.network, "config", None), "_name_or_path", ""))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block the network is in evaluation mode, whatever happens there."""
        was_training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(was_training)

    def inputs(self, clips: Sequence[Clip], margin: float | None) -> tuple[Tensor, Tensor]:
        """What `collate` makes of clips, on the network's device; features in its dtype."""
        features, mask = self.collate([self.prepare(clip) for clip in clips], margin)
        return features.to(self.device, self.dtype), mask.to(self.device)

    def text_logits(
        self, clip: Clip, tokens: Sequence[int], prompt: int, margin: float | None
    ) -> Tensor:
        """What the network expects at each token of a text, given those before: float32 [n, V].

        Args:
            clip: up to 30 s.
            tokens, prompt: from `token_ids`; n tokens follow the prompt.
            margin: as for `collate`.
        """
        features, mask = self.inputs([clip], margin)
        given = torch.tensor([list(tokens[:-1])], device=self.device)
        kept = torch.arange(prompt - 1, given.shape[1], device=self.device)
        with self.context.batch(self.encoder_mask(mask)):
            return self.outputs(features, mask, given, kept).logits

    @abstractmethod
    def prepare(self, clip: Clip) -> Tensor:
        """What can be made of one clip alone, before it joins a batch."""

    @abstractmethod
    def frames(self, prepared: Tensor) -> int:
        """Spectrogram frames that hold a prepared clip's audio."""

    @abstractmethod
    def collate(
        self, prepared: Sequence[Tensor], margin: float | None, step: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Features of a batch and a bool mask [B, frames], True where there is audio.

        Args:
            prepared: by `prepare`.
            margin: seconds of silence after the longest clip, for models that hear padding; None
                is the model's whole window.
            step: spectrogram frames are a multiple of it, as far as the model takes so many.
        """

    @abstractmethod
    def mel(self, features: Tensor) -> Tensor:
        """A view of features as [B, mel bins, frames]."""

    @abstractmethod
    def prompt_language(self, clips: Sequence[Clip]) -> str | None:
        """The code that the prompt of these clips' texts names: one for all; None names none."""

    @abstractmethod
    def token_ids(self, text: str, language: str | None = None) -> tuple[list[int], int]:
        """The decoder's whole sequence for a text, and how many tokens of it are the prompt.

        `language` is what `prompt_language` gave.
        """

    @abstractmethod
    def outputs(self, features: Tensor, mask: Tensor, inputs: Tensor, kept: Tensor) -> Outputs:
        """A training pass.

        Args:
            features, mask: as from `collate`.
            inputs: token ids [B, L].
            kept: int64 [n], the positions in [B * L] whose logits are wanted, in order.
        """

    @abstractmethod
    def encoder_mask(self, mask: Tensor) -> Tensor:
        """The mask of `collate` at the encoder's frame rate: [B, T'] bool."""

    @abstractmethod
    def decode(
        self,
        clips: Sequence[Clip],
        beam_size: int,
        language: str | None,
        own_words: OwnWords | None = None,
    ) -> list[str]:
        """The text of clips that fit the model's window, decoded together."""

    def own_words(self, phrases: Sequence[str], bonus: float = BONUS) -> OwnWords:
        """Names and terms, as `text.phrases` checks them, for this model's decoding.

        Args:
            phrases: as a person writes them.
            bonus: nats a token.

        Raises:
            SAMLError: the model's decoding is not ours.
        """
        spelt = []
        for form in (form for phrase in phrases for form in variants(phrase)):
            tokens, prompt = self.token_ids(form)
            spelt.append(tokens[prompt:-1])
        return OwnWords(spelt, bonus)

    @abstractmethod
    def no_speech(self, clip: Clip) -> float | None:
        """The probability that there is no speech in a clip of up to 30 s; None: it cannot say."""

    @abstractmethod
    def language_code(self, language: str | None, task: str) -> str | None:
        """The code of a language that the network knows; None has to be detected.

        Raises:
            SAMLError: the network does not know the language or the task.
        """

    @abstractmethod
    def detect_language(self, clip: Clip) -> str:
        """The code of the language a clip is in."""

    @abstractmethod
    def pieces(
        self,
        clip: Clip,
        language: str,
        options: DecodingOptions,
        on_progress: Callable[[float, float], None],
        on_text: Callable[[str], None],
    ) -> Pieces:
        """A recording of any length, with times: piece by piece.

        Args:
            clip: float32 [samples] at 16 kHz.
            language: its code.
            options: `options.language` is not asked.
            on_progress: called with (seconds done, seconds in all).
            on_text: called with all the text so far, as it grows.

        Raises:
            SAMLError: the model cannot do what the options ask.
        """

    def hear(self, pieces: Sequence[Piece]) -> list[Any]:
        """Answer pieces of one kind, which are not "plain", decoded together.

        The network's context has a speaker for each, or none.
        """
        if pieces[0].kind == "alone":
            return [piece.given() for piece in pieces]
        found = []
        for i, piece in enumerate(pieces):
            with self.context.narrowed(slice(i, i + 1)):
                found.append(self.detect_language(piece.clip))
        return found

    def heard_at_once(self, pieces: Sequence[Piece]) -> int:
        """How many of these pieces, from the first on, `hear` decodes in one pass."""
        return len(pieces)

    @classmethod
    @abstractmethod
    def computed(cls, name: str) -> Callable[[torch.Size], Tensor] | None:
        """What gives a parameter's values by its shape, so that no file holds it; else None."""

    @classmethod
    @abstractmethod
    def extent(cls, config: Any) -> tuple[int, int]:
        """Number of layers, and the largest table made without a file's bytes, that config asks."""

    @classmethod
    def fits(cls, config: Any, tensors: int) -> bool:
        """Whether a file of so many tensors can be of this network, before it takes memory."""
        layers, positions = cls.extent(config)
        return layers <= tensors and positions <= 2**16

    @classmethod
    @abstractmethod
    def load_processor(cls, folder: Path) -> Any:
        """The processor that was saved beside a network."""


def context_of(network: nn.Module) -> BatchContext:
    """What the layers of a network share while a batch runs; a plain one's is read by nobody."""
    saml: Any = getattr(network, "saml", None)
    return BatchContext() if saml is None else saml.context


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


def margin_of(network: nn.Module) -> float | None:
    """Seconds of silence after a clip that a network is given by itself; None: its whole window.

    What the network's configuration says as `window_margin`, which all of it has learnt; else short
    where its experts learnt that; else `Compression.margin`.
    """
    said: Any = getattr(getattr(network, "config", None), "window_margin", None)
    if isinstance(said, (int, float)) and 0 <= said <= MAX_SECONDS:
        return said
    saml: Any = getattr(network, "saml", None)
    if saml is None:
        return None
    return SHORT_WINDOW_MARGIN if saml.short_windows else saml.margin
