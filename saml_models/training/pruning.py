"""Dropping the experts that a speaker does not use.

An expert's share of its layer is the mean over tokens of g_e |B_e A_e x| beside |W x|. The least
shares go first, over the whole model; each layer keeps one. What is left is renormalised by the
router's softmax, and profile and arithmetic shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.layers.linear import SAMLLinear
from saml_models.compress.layers import compression_of
from saml_models.compress.packing import pack_experts
from saml_models.data.corpora import Utterance, short_clips
from saml_models.models.interface import Clip, SpeechModel
from saml_models.models.registry import bind
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.wer import pooled, word_errors
from saml_models.transcription.clips import decode_clips
from saml_models.transcription.confidence import confidence

__all__ = ["ExpertUsage", "PruningPoint", "measure_usage", "prune", "prune_curve"]

WORD_ERRORS = ("wer_before", "wer_after", "test_utterances")
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # of the experts, in the curve


@dataclass(frozen=True)
class ExpertUsage:
    """What a speaker's clips make of the experts.

    Attributes:
        layers: names, in the model's order.
        gates: [layers, E] mean gates.
        shares: [layers, E] mean size of what an expert adds, of the base's.
    """

    layers: list[str]
    gates: Tensor
    shares: Tensor


@dataclass(frozen=True)
class PruningPoint:
    """One point of the curve: experts left, bytes of the profile's tensors, WER in per cent."""

    experts: int
    bytes: int
    wer: float


@torch.inference_mode()
def measure_usage(
    speech: SpeechModel, clips: Sequence[Clip], profile: SpeakerProfile
) -> ExpertUsage:
    """Gates and shares over a speaker's clips (each at most 30 s).

    Raises:
        SAMLError: no clips, no whole profile of experts, or the layers have no routers of their
            own.
    """
    _check_whole(profile)
    saml = compression_of(speech.network)
    layers, count = saml.layers, saml.config.num_experts
    if not layers or not clips:
        raise SAMLError("pruning: expected clips, and a model whose layers have their own routers")
    place = {name: i for i, name in enumerate(layers)}
    gates, shares = torch.zeros(2, len(layers), count)
    tokens = torch.zeros(len(layers), 1)

    def watch(name: str) -> Any:
        def hook(layer: SAMLLinear, args: tuple[Tensor], output: Tensor) -> None:
            x = args[0].flatten(0, -2).float()
            own = layer.gates(args[0]).expand(*args[0].shape[:-1], count).flatten(0, -2).float()
            projected = torch.einsum("mk,erk->mer", x, layer.lora_a.float())
            gram = torch.einsum("enr,ens->ers", layer.lora_b.float(), layer.lora_b.float())
            size = torch.einsum("mer,ers,mes->me", projected, gram, projected).clamp(min=0).sqrt()
            scale = layer.config.scaling / output.flatten(0, -2).float().norm(dim=-1).clamp(1e-6)
            i = place[name]
            gates[i] += own.sum(0).cpu()
            shares[i] += (own * size * scale.unsqueeze(-1)).sum(0).cpu()
            tokens[i] += len(x)

        return hook

    with profile.applied(speech.network):
        texts = decode_clips(speech, clips)
        hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
        try:
            for clip, text in zip(clips, texts, strict=True):
                confidence(speech, clip, text)
        finally:
            for hook in hooks:
                hook.remove()
    return ExpertUsage(list(layers), gates / tokens.clamp(min=1), shares / tokens.clamp(min=1))


def prune(profile: SpeakerProfile, model: Any, usage: ExpertUsage, experts: int) -> SpeakerProfile:
    """The profile with its `experts` most used ones, one in each layer at least.

    Raises:
        SAMLError: a profile of gates or one that is pruned already, or a number that cannot be.
    """
    layers, count = len(usage.layers), usage.shares.shape[1]
    _check_whole(profile)
    if not layers <= experts <= layers * count:
        raise SAMLError(f"pruning: {experts} experts; expected {layers} to {layers * count}")
    wanted = torch.zeros_like(usage.shares, dtype=torch.bool)
    wanted.scatter_(1, usage.shares.argmax(1, keepdim=True), True)
    ranked = usage.shares.masked_fill(wanted, torch.inf).flatten().argsort(descending=True)
    wanted.view(-1)[ranked[:experts]] = True
    kept = {
        name: row.nonzero().flatten().tolist()
        for name, row in zip(usage.layers, wanted, strict=True)
        if not row.all()
    }
    values = dict(profile.experts(model))
    for name, left in kept.items():
        for part in ("lora_a", "lora_b", "router.weight"):
            values[f"{name}.{part}"] = values[f"{name}.{part}"][left]
    tensors = pack_experts(values, compression_of(model).config.expert_format)
    # The word error rates were the whole profile's.
    about = {k: v for k, v in profile.about.items() if k not in WORD_ERRORS}
    about |= {"experts": experts, "experts_before": layers * count}
    return replace(profile, tensors=tensors, kept=kept, about=about)


def _check_whole(profile: SpeakerProfile) -> None:
    if profile.kind != "experts" or profile.kept:
        raise SAMLError(f"{profile.name}: expected a whole profile of experts to prune")


def prune_curve(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    profile: SpeakerProfile,
    max_loss: float,
) -> tuple[SpeakerProfile, ExpertUsage, list[PruningPoint]]:
    """Prune step by step, and take the smallest profile within `max_loss` of the whole one's WER.

    Args:
        model: that the profile fits; left as it was.
        processor: of that model.
        utterances: of the speaker, with text; usage and WER are measured on them.
        profile: of kind "experts", whole.
        max_loss: WER in per cent, absolute, that may be lost.

    Raises:
        SAMLError: an utterance of over 30 s, or a profile that cannot be pruned.
    """
    _check_whole(profile)
    clips, references = short_clips(utterances), [u.text for u in utterances]
    speech = bind(model, processor)
    usage = measure_usage(speech, clips, profile)
    layers, most = len(usage.layers), usage.shares.numel()
    best, points = profile, []
    for share in SHARES:
        experts = max(layers, round(share * most))
        smaller = profile if experts == most else prune(profile, model, usage, experts)
        hypotheses = decode_clips(speech, clips, speakers=[smaller] * len(clips))
        points.append(
            PruningPoint(
                experts, smaller.nbytes, float(pooled(word_errors(references, hypotheses)).wer)
            )
        )
        if points[-1].wer <= points[0].wer + max_loss:
            best = smaller
    return best, usage, points
