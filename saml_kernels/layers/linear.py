"""`SAMLLinear`: used exactly like `nn.Linear`, with a low-bit base and gated LoRA experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels.backends import grouping, reference
from saml_kernels.config import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.layers.companions import Companions
from saml_kernels.layers.context import BatchContext, BlockGates, SpeakerExperts
from saml_kernels.layers.init import balanced, roots
from saml_kernels.layers.routers import Router, SpeakerRouter, TokenRouter, UtteranceRouter
from saml_kernels.ops.api import saml_linear, saml_linear_routed
from saml_kernels.ops.arguments import autocast_dtype, readable
from saml_kernels.ops.call import eager, grad_enabled, is_compiling
from saml_kernels.quantization.tensor import QuantizedTensor, quantize

__all__ = ["SAMLLinear"]


class SAMLLinear(nn.Module):
    """y = x W^T + bias + scaling * sum_e gates_e (x A_e^T) B_e^T, with W frozen in low bits.

    Attributes:
        weight: `QuantizedTensor` [N, K].
        bias: frozen [N] or None.
        lora_a: parameter [E, r, K]; lora_b: parameter [E, N, r].
        router: from x to the gates, or None when the gates come from `block`.
        speaker_experts: many speakers' experts; which of them a clip uses, `context.speakers` says.
    """

    speaker_experts: SpeakerExperts | None = None
    companions: Companions | None = None  # layers that read the same x; see `together`

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: Tensor | None,
        config: SAMLConfig,
        context: BatchContext | None = None,
        *,
        clip_width: int | None = None,
        block: BlockGates | None = None,
    ) -> None:
        """Wrap an already quantised weight; `from_linear` is what most callers want.

        Args:
            weight: [N, K].
            bias: [N] or None.
            config: experts and router; `num_experts=0` gives a plain low-bit layer.
            context: shared by the layers of a model; None makes one of its own.
            clip_width: of a decoder layer, whose utterance router reads the encoder's output of
                this width instead of x.
            block: shared gates for router="shared".
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.config, self.context, self.block = config, context or BatchContext(), block
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        experts, rank = config.num_experts, config.rank
        self.lora_a = nn.Parameter(torch.empty(experts, rank, self.in_features), experts > 0)
        self.lora_b = nn.Parameter(torch.empty(experts, self.out_features, rank), experts > 0)
        self.start_as_lora()
        self.router = self._make_router(clip_width) if experts else None

    def _make_router(self, clip_width: int | None) -> Router | None:
        if self.config.router == "token":
            return TokenRouter(self.in_features, self.config, self.context)
        if self.config.router == "speaker":
            return SpeakerRouter(self.config, self.context)
        if self.config.router == "utterance":
            return UtteranceRouter(self.in_features, self.config, self.context, clip_width)
        return None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: SAMLConfig,
        context: BatchContext | None = None,
        *,
        clip_width: int | None = None,
        block: BlockGates | None = None,
        weight: QuantizedTensor | None = None,
    ) -> SAMLLinear:
        """Quantise `linear` and surround it with experts; the layer itself is left alone.

        Args:
            linear: weight [N, K].
            config, context, clip_width, block: as for the constructor.
            weight: what stands for the layer's weight; None rounds it with `quantize`. Experts
                then start as a LoRA does: a weight that was rounded for the layer's outputs is not
                made better by what it lacks of the original.

        Raises:
            SAMLError: the weight holds NaN or infinity.

        Example:
            >>> layer = SAMLLinear.from_linear(nn.Linear(64, 32), SAMLConfig(num_experts=2, rank=4))
            >>> layer(torch.ones(5, 64)).shape
            torch.Size([5, 32])
        """
        source = linear.weight.detach()
        rounded = weight is None
        if weight is None:
            weight = quantize(source, config.format, config.block_size, config.double_quant)
        layer = cls(weight, linear.bias, config, context, clip_width=clip_width, block=block)
        layer.to(source.device)
        if rounded and config.expert_init == "loftq" and config.num_experts:
            layer.start_at_quantisation_error(source)
        return layer

    @torch.no_grad()
    def start_as_lora(self) -> None:
        """Draw A at random and set B to zero: the experts add nothing (arXiv 2106.09685)."""
        self.lora_a.copy_(torch.randn(self.lora_a.shape) / math.sqrt(self.in_features))
        self.lora_b.zero_()

    @torch.no_grad()
    def start_at_quantisation_error(self, original: Tensor, moment: Tensor | None = None) -> None:
        """Set the experts to the low-rank part of W - dequantise(Wq) under equal gates.

        With mix="sum" the E experts share the R = E * r largest singular directions, dealt out in
        turn; with mix="merged" each gets the same r directions, told apart by a little noise.

        Args:
            original: W [N, K].
            moment: E[x x^T] [K, K] of the layer's inputs x. With it, the error that is made small
                is that of the output on such inputs, instead of that of the weight.

        Source: LoftQ (arXiv 2310.08659), one step, with the experts in place of one LoRA; with
        `moment` QERA (arXiv 2410.06040), theorem 1.
        """
        config = self.config
        experts, rank = config.num_experts, config.rank
        error = original.double() - self.weight.dequantize(torch.float64)
        root, inverse = roots(moment, error)
        u, s, v = torch.linalg.svd(error @ root, full_matrices=False)
        a_all, b_all = balanced(s[:, None] * v @ inverse, u)
        merged = config.mix == "merged"
        needed = rank if merged else experts * rank
        if a_all.shape[0] < needed:
            extra = needed - a_all.shape[0]
            a_all, b_all = F.pad(a_all, (0, 0, 0, extra)), F.pad(b_all, (0, extra))
        if merged:
            index = torch.arange(rank).expand(experts, rank)
            share = 1.0
        else:
            index = torch.arange(experts * rank).view(rank, experts).T
            share = float(config.top_k or experts)
        factor = math.sqrt(share / config.scaling)
        a, b = a_all[index] * factor, b_all[:, index].permute(1, 0, 2) * factor
        if merged:
            a = a + torch.randn_like(a) * a.std() * 0.1
        self.lora_a.copy_(a)
        self.lora_b.copy_(b)

    def gates(self, x: Tensor) -> Tensor:
        """Gates for x [..., K]: [..., E], or what broadcasts to it."""
        if self.router is not None:
            return self.router(x)
        if self.block is not None and self.block.gates is not None:
            return self.block.gates.to(x.dtype)
        return x.new_full((1,) * (x.dim() - 1) + (len(self.lora_a),), 1 / max(1, len(self.lora_a)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        found = self._few_rows(x)
        if found is not None:
            return found
        if self.speaker_experts is not None:
            rows = x if x.dim() > 2 else x.unsqueeze(-2)
            y = self._of_many(rows, self.speaker_experts)
            return y.view(*x.shape[:-1], self.out_features)
        if self.companions is not None and not torch.is_grad_enabled():
            found = self.companions.take(self, x)
            if found is not None:
                return found
        lora_a, lora_b, bias = self.lora_a, self.lora_b, self.bias
        if lora_a.dtype != x.dtype:
            lora_a, lora_b, bias = (readable(t, x) for t in (lora_a, lora_b, bias))
        if len(lora_a) == 0:
            return saml_linear(x, self.weight, lora_a, lora_b, x.new_empty(0), bias)
        c, scaling = self.config, self.config.scaling
        weight = self._plain_router(x)
        if weight is not None:
            return saml_linear_routed(
                x, self.weight, lora_a, lora_b, weight, bias, scaling, c.top_k, c.temperature
            )
        dropping = self.training and c.dropout > 0
        x = x.to(autocast_dtype(x) or x.dtype)
        gates = self.gates(x)
        if self.config.mix == "sum" and not dropping:
            return saml_linear(x, self.weight, lora_a, lora_b, gates, bias, scaling)
        # Dropout acts on the experts' input alone and merged experts are one LoRA per clip: both
        # are the bare base plus a few small products.
        base = saml_linear(x, self.weight, lora_a[:0], lora_b[:0], x.new_empty(0), bias)
        seen = F.dropout(x, self.config.dropout, self.training)
        experts = _merged if self.config.mix == "merged" else _summed
        return base + scaling * experts(seen, lora_a.to(x.dtype), lora_b.to(x.dtype), gates)

    def _few_rows(self, x: Tensor) -> Tensor | None:
        """`forward` of a few rows on a CPU: what it would find out for the same native call.

        None where something is out of the ordinary, or another way is faster. A token is a matter
        of microseconds there, of which a module's look-up of its parameters takes one each.
        """
        if is_compiling() or grad_enabled():
            return None
        module, parameter = self._modules.get, self._parameters.get
        weight: Any = module("weight")
        native = None if weight is None else weight.native
        if native is None or native.many or weight.prepared is not None:
            return None
        if self.speaker_experts is not None or not eager(x):
            return None
        router: Any = module("router")
        gates, gating, scaling = None, None, 1.0
        if router is not None:
            c = self.config
            if type(router) is not TokenRouter or router.offset is not None:
                return None
            if self.training and (c.dropout > 0 or c.balance > 0):
                return None
            gates, scaling = router._parameters.get("weight"), c.scaling
            gating = (c.top_k, c.temperature)
        elif native.experts:
            return None
        experts = parameter("lora_a"), parameter("lora_b")
        same = native.holds(weight, *experts, gates, parameter("bias"), scaling, gating)
        return native(x, None) if same else None

    def _plain_router(self, x: Tensor) -> Tensor | None:
        """The weight of a token router that the kernels can run themselves, as x wants it."""
        c, router = self.config, self.router
        if not isinstance(router, TokenRouter) or router.offset is not None:
            return None
        # Dropout changes what the experts see, balancing needs the router's own probabilities.
        if self.training and (c.dropout > 0 or c.balance > 0):
            return None
        weight = router.weight
        # accelerate moves a router's weight to x only while the router itself is called.
        if weight.device != x.device:
            return None
        return weight if weight.dtype == x.dtype else readable(weight, x)

    def arguments(self, x: Tensor) -> tuple[Any, ...] | None:
        """lora_a, lora_b, router, bias, scaling and gating of a call that is the operator alone.

        None where it is more than that, or gates are made elsewhere.
        """
        if self.speaker_experts is not None:
            return None
        lora_a, lora_b, bias = (readable(t, x) for t in (self.lora_a, self.lora_b, self.bias))
        if len(lora_a) == 0:
            return lora_a, lora_b, x.new_empty(0), bias, 1.0, None
        c, router = self.config, self._plain_router(x)
        if router is None:
            return None
        return lora_a, lora_b, router, bias, c.scaling, (c.top_k, c.temperature)

    @staticmethod
    def together(layers: Sequence[SAMLLinear]) -> bool:
        """Let layers that read the same x run in one launch: q, k and v of an attention.

        Used like before, one by one. For a few tokens, without gradients and on a GPU, whoever is
        called first with an x runs all of them, and the others hand out what was computed; calls
        that this does not serve go their own way. Copies and pickles of a layer are on their own.

        Returns:
            Whether the layers can: two or three of one shape, format and configuration.
        """
        return Companions.of(layers)

    def _of_many(self, x: Tensor, speaker_experts: SpeakerExperts) -> Tensor:
        """x [rows, T, K] -> [rows, T, N], each clip by its own speaker's experts."""
        c, scaling, index = self.config, self.config.scaling, self.context.speakers_of(x)
        lora_a, lora_b, bias = (
            readable(t, x) for t in (speaker_experts.lora_a, speaker_experts.lora_b, self.bias)
        )
        router = readable(speaker_experts.router, x)
        if isinstance(self.router, TokenRouter) and speaker_experts.offset is None:
            return saml_linear_routed(
                x, self.weight, lora_a, lora_b, router, bias, scaling, c.top_k, c.temperature,
                speakers=index,
            )  # fmt: skip
        x = x.to(autocast_dtype(x) or x.dtype)
        router = router.to(x.dtype)
        if isinstance(self.router, TokenRouter | UtteranceRouter):
            logits = grouping.logits(self.router.seen(x), router, index)
        elif self.router is not None:
            logits = router[index]
        else:
            raise SAMLError("speaker_experts: a shared router cannot be another one for each row")
        if speaker_experts.offset is not None:
            logits = logits + speaker_experts.offset[index].to(logits)
        gates = reference.gates_from_logits(logits, c.top_k, c.temperature).to(x.dtype)
        if c.mix == "sum":
            return saml_linear(x, self.weight, lora_a, lora_b, gates, bias, scaling, speakers=index)
        lora_a, lora_b = (
            t.dequantize(x.dtype) if isinstance(t, QuantizedTensor) else t for t in (lora_a, lora_b)
        )
        base = saml_linear(x, self.weight, lora_a[0, :0], lora_b[0, :0], x.new_empty(0), bias)
        own = index.flatten()
        own_a, own_b = lora_a[own].to(x.dtype), lora_b[own].to(x.dtype)
        return base + scaling * _merged(x, own_a, own_b, gates)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        c = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.weight.format}, "
            f"experts={len(self.lora_a)}, rank={c.rank}, router={c.router}, mix={c.mix}"
        )


def _summed(x: Tensor, lora_a: Tensor, lora_b: Tensor, gates: Tensor) -> Tensor:
    """sum_e g_e B_e A_e x: x [..., K] -> [..., N]."""
    projected = torch.einsum("...k,erk->...er", x, lora_a) * gates.unsqueeze(-1)
    return torch.einsum("...er,enr->...n", projected, lora_b)


def _merged(x: Tensor, lora_a: Tensor, lora_b: Tensor, gates: Tensor) -> Tensor:
    """(sum_e g_e B_e)(sum_e g_e A_e) x: x [B, T, K], gates [B or 1, 1, E] -> [B, T, N].

    The experts are [E, ...], or [B, E, ...] where each clip has its own.
    """
    rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    clip = gates.reshape(-1, gates.shape[-1])
    own = (t if t.dim() == 4 else t.unsqueeze(0) for t in (lora_a, lora_b))
    a, b = (torch.einsum("be,beij->bij", clip, t) for t in own)
    return (rows @ a.transpose(1, 2) @ b.transpose(1, 2)).reshape(*x.shape[:-1], b.shape[1])
