"""Routers: from what a layer sees to its gates, a softmax over the experts.

`token` looks at each token, `utterance` at the mean of a clip, `speaker` at nothing (a learnt
vector), and `SharedRouter` is the authors' own, one for all attention blocks of a kind.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels.backends import reference
from saml_kernels.config import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.layers.context import BatchContext

__all__ = ["Router", "SharedRouter", "SpeakerRouter", "TokenRouter", "UtteranceRouter"]


def gates_from_logits(
    logits: Tensor, config: SAMLConfig, context: BatchContext, training: bool
) -> Tensor:
    """Softmax in float32, top-k where the config asks for it: [..., E] in the logits' dtype.

    While training, the load-balancing term E * sum_e f_e p_e joins `context.balance`, with p_e the
    mean probability of expert e and f_e the share of tokens whose largest gate it is.
    """
    if training and config.balance > 0:
        probabilities = reference.gates_from_logits(logits, None, config.temperature)
        flat = probabilities.reshape(-1, probabilities.shape[-1])
        index = torch.arange(flat.shape[-1], device=flat.device)
        chosen = (flat.argmax(-1, keepdim=True) == index).to(flat.dtype).mean(0)
        context.balance.append(flat.shape[-1] * (chosen * flat.mean(0)).sum())
    return reference.gates_from_logits(logits, config.top_k, config.temperature).to(logits.dtype)


class Router(nn.Module):
    """What the routers of single layers have in common.

    Attributes:
        weight: parameter; its last dimension is what the router looks at.
        offset: [E] added to the logits, or None; no part of the state, so that a saved model keeps
            its router as it was trained. A speaker's profile of kind "gates" is made of these.
            [S + 1, E] in training: each clip adds the row that `context.speakers` says, none where
            it says nothing, and the first, which stays zero, is nobody's.
    """

    weight: nn.Parameter
    offset: Tensor | None = None

    def __init__(self, config: SAMLConfig, context: BatchContext) -> None:
        super().__init__()
        self.config, self.context = config, context

    def gates(self, logits: Tensor) -> Tensor:
        """[..., E] -> [..., E]; [rows, T, E] or what broadcasts to it, with offsets by speaker."""
        if self.offset is not None and self.offset.dim() == 1:
            logits = logits + self.offset.to(logits)
        elif self.offset is not None and self.context.speakers is not None:
            own = self.context.speakers_of(logits)
            logits = logits + F.embedding(own, self.offset, padding_idx=0).to(logits)
        return gates_from_logits(logits, self.config, self.context, self.training)

    def seen(self, x: Tensor) -> Tensor:
        """What the router's linear map is applied to, for x [..., K]."""
        return x


class TokenRouter(Router):
    """Gates of each token from a linear map of it: x [..., K] -> [..., E]."""

    def __init__(self, in_features: int, config: SAMLConfig, context: BatchContext) -> None:
        super().__init__(config, context)
        # Zero start: every expert begins with the same share, and the gradient breaks the tie.
        self.weight = nn.Parameter(torch.zeros(config.num_experts, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> gates [..., E]."""
        return self.gates(F.linear(x, self.weight.to(x.dtype)))


class UtteranceRouter(Router):
    """One gate vector per clip: x [B, T, K] -> [B, 1, E].

    An encoder layer pools its own input over the clip. A decoder layer cannot (cached decoding
    shows it one token at a time), so it reads the encoder's pooled output instead.
    """

    def __init__(
        self,
        in_features: int,
        config: SAMLConfig,
        context: BatchContext,
        clip_width: int | None = None,
    ) -> None:
        """A router for x of width `in_features`, or for encoded clips of width `clip_width`."""
        super().__init__(config, context)
        self.from_clip = clip_width is not None
        self.weight = nn.Parameter(torch.zeros(config.num_experts, clip_width or in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, K] -> gates [B, 1, E]."""
        pooled = self.seen(x)
        gates = self.gates(F.linear(pooled, self.weight.to(pooled.dtype))).to(x.dtype)
        return gates if x.dim() == 3 else gates.reshape(*[1] * (x.dim() - 1), -1)

    def seen(self, x: Tensor) -> Tensor:
        """x [B, T, K] -> the clips' vectors [B, 1, K or d]."""
        batched = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
        if self.from_clip:
            return self.context.for_rows(batched.shape[0]).unsqueeze(1)
        return self.context.pooled(batched).unsqueeze(1)


class SpeakerRouter(Router):
    """A fixed learnt vector: the gates of one speaker, whatever is said."""

    def __init__(self, config: SAMLConfig, context: BatchContext) -> None:
        super().__init__(config, context)
        self.weight = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> gates [1, ..., E], to be broadcast."""
        gates = self.gates(self.weight)
        return gates.to(x.dtype).reshape(*[1] * (x.dim() - 1), -1)


class AttentionPooling(nn.Module):
    """Mean over time with learnt weights: x [B, T, d] -> [B, d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, d], mask [B, T] (True where x counts) -> [B, d]."""
        scores = self.attention(x)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-1), float("-inf"))
        return (torch.softmax(scores, dim=1) * x).sum(1)


def _over_time(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """x [B, T, d] -> [B, T, d]."""
    return conv(x.transpose(1, 2)).transpose(1, 2)


class SharedRouter(nn.Module):
    """The authors' router: convolution over time, attention pooling, linear, softmax.

    One instance serves all attention blocks of a kind (encoder self, decoder self, cross); the
    cross one pools both sides. The gates of a block are kept by the block's layers, and in cached
    decoding they stay those of the first step, where training saw the whole text.

    Source: class Router of qmgzhao/SAML, whisper/model_moe.py; equation 5 of arXiv 2406.19706.
    """

    def __init__(
        self,
        width: int,
        config: SAMLConfig,
        context: BatchContext,
        *,
        text: bool = False,
        cross: bool = False,
    ) -> None:
        """A router for blocks of width `width`.

        Args:
            width: d.
            config: gives E and the temperature.
            context: of the model; its mask leaves padding out.
            text: x is text, which the audio's mask says nothing about.
            cross: the encoder's output is pooled too.
        """
        super().__init__()
        self.config, self.context, self.text = config, context, text
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.pool = AttentionPooling(width)
        self.cross_conv = nn.Conv1d(width, width, 3, padding=1) if cross else None
        self.cross_pool = AttentionPooling(width) if cross else None
        self.linear = nn.Linear(width * (2 if cross else 1), config.num_experts)

    def forward(self, x: Tensor, encoded: Tensor | None = None) -> Tensor:
        """x [B, T, d] (and the encoder's output [B, S, d]) -> gates [B, 1, E]."""
        dtype = self.conv.weight.dtype
        mask = None if self.text else self.context.mask_for(x)
        pooled = self.pool(_over_time(self.conv, x.to(dtype)), mask)
        if self.cross_conv is not None and self.cross_pool is not None:
            if encoded is None:
                raise SAMLError("shared router: cross attention needs the encoder's output")
            other = _over_time(self.cross_conv, encoded.to(dtype))
            encoded_pool = self.cross_pool(other, self.context.mask_for(encoded))
            pooled = torch.cat((pooled, encoded_pool), dim=-1)
        logits = self.linear(pooled).unsqueeze(1)
        return gates_from_logits(logits, self.config, self.context, self.training)
