"""What the layers of a model share while a batch runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["BatchContext", "BlockGates", "SpeakerExperts"]


@dataclass
class BlockGates:
    """Gates [B, 1, E] that one attention block's layers share (router="shared")."""

    gates: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds the gates without what made them: PyTorch copies no graph."""
        return {"gates": None if self.gates is None else self.gates.detach()}


@dataclass
class SpeakerExperts:
    """The experts of S speakers, used by one layer in place of its own; frozen.

    Attributes:
        lora_a: [S, E, r, K].
        lora_b: [S, E, N, r]; on the CPU float ones best lie in memory as [S, N, E, r], and both may
            be in int8 without double quantisation, for x in float32.
        router: [S, E, K], [S, E, d] or [S, E]: the weights of a token, utterance or speaker router.
        offset: [S, E], added to the router's logits, -inf for an expert that a speaker has not; or
            None.
    """

    lora_a: Tensor | QuantizedTensor
    lora_b: Tensor | QuantizedTensor
    router: Tensor
    offset: Tensor | None = None


@dataclass
class BatchContext:
    """What the layers of one model share during a forward pass.

    Attributes:
        mask: [B, T] bool, True where an encoder frame holds audio; None means everywhere.
        clip: [B, d], the mean of the encoder's output over the audio, for the decoder's routers.
        balance: load-balancing terms of this pass (scalars), one per routed layer.
        speakers: [B] int32, which of a layer's `SpeakerExperts` each clip uses, and which row of a
            router's offsets.
    """

    mask: Tensor | None = None
    clip: Tensor | None = None
    balance: list[Tensor] = field(default_factory=list)
    speakers: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model, or a pickled one, is in the middle of no backward pass."""
        clip = None if self.clip is None else self.clip.detach()
        return {**vars(self), "clip": clip, "balance": []}

    def speakers_of(self, x: Tensor) -> Tensor:
        """Whose each row of x [rows, T, K] is, as [rows, 1]; beams of a clip lie side by side."""
        if self.speakers is None or x.shape[0] % len(self.speakers):
            have = "none" if self.speakers is None else len(self.speakers)
            raise SAMLError(f"speakers: {have} for {x.shape[0]} rows; expected one for each clip")
        return self.speakers.repeat_interleave(x.shape[0] // len(self.speakers)).unsqueeze(1)

    @contextmanager
    def batch(self, mask: Tensor | None, speakers: Tensor | None = None) -> Iterator[None]:
        """Within the block a batch with this mask [B, T] runs; what was there before comes back.

        `speakers`, where they are given, stand in for those that are there.
        """
        before = self.mask, self.speakers
        self.mask = mask
        self.speakers = self.speakers if speakers is None else speakers
        try:
            yield
        finally:
            self.mask, self.speakers = before

    @contextmanager
    def narrowed(self, clips: slice) -> Iterator[None]:
        """Within the block these clips are the batch, with their speakers and vectors."""
        speakers, vectors = self.speakers, self.clip
        try:
            self.speakers = None if speakers is None else speakers[clips]
            self.clip = None if vectors is None else vectors[clips]
            yield
        finally:
            self.speakers, self.clip = speakers, vectors

    def keep(self, clips: Tensor) -> None:
        """Go on with these clips [n] of the batch, int64, in a decoder that drops the others."""
        self.clip = None if self.clip is None else self.clip[clips]
        self.speakers = None if self.speakers is None else self.speakers[clips]

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask for audio x [B, T, d], repeated for beams (those of a clip lie side by side).

        None where there is no mask, or it belongs to a window of another length.
        """
        if self.mask is None or self.mask.shape[1] != x.shape[1] or x.shape[0] % len(self.mask):
            return None
        return self.mask.repeat_interleave(x.shape[0] // len(self.mask), dim=0)

    def pooled(self, x: Tensor) -> Tensor:
        """Mean over time of audio x [B, T, d], padding left out: [B, d]."""
        mask = self.mask_for(x)
        if mask is None:
            return x.mean(1)
        weight = mask.to(x.dtype).unsqueeze(-1)
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1)

    def for_rows(self, rows: int) -> Tensor:
        """The clip vectors for `rows` decoder rows (beams of one clip lie side by side)."""
        if self.clip is None or rows % self.clip.shape[0]:
            have = None if self.clip is None else self.clip.shape[0]
            raise SAMLError(f"router: {rows} decoder rows, {have} encoded clips; run the encoder")
        return self.clip.repeat_interleave(rows // self.clip.shape[0], dim=0)

    def balance_loss(self) -> Tensor | None:
        """Sum of this pass's load-balancing terms, and forget them."""
        total = torch.stack(self.balance).sum() if self.balance else None
        self.balance.clear()
        return total
