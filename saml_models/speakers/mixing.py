"""Many speakers in one batch: their profiles stacked beside the base, a row for each clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels.backends.cpu import native
from saml_kernels.layers.context import SpeakerExperts
from saml_kernels.layers.linear import SAMLLinear
from saml_kernels.quantization.tensor import QuantizedTensor
from saml_models.compress.layers import compression_of
from saml_models.compress.packing import EXPERT_BLOCK, int8_expert
from saml_models.speakers.profile import SpeakerProfile

__all__ = ["hears_short_windows", "mixed_batch"]

Speaker = SpeakerProfile | None  # None is the model as it is


def hears_short_windows(model: nn.Module, speaker: Speaker) -> bool:
    """Whether the speaker's experts were trained on short windows."""
    if speaker is None:
        return bool(getattr(getattr(model, "saml", None), "short_windows", False))
    return bool(speaker.about.get("short_windows"))


@contextmanager
def mixed_batch(model: nn.Module, speakers: Sequence[Speaker]) -> Iterator[None]:
    """Within the block, clip i of a batch is heard with `speakers[i]`; then all is as before.

    Beams of a clip follow it. The base weights are not touched: what is loaded are the distinct
    profiles' experts.

    Args:
        model: with SAML layers, unless all speakers are None.
        speakers: one for each clip; all alike in `hears_short_windows`, and all the same one where
            the layers share routers (`Compression.can_mix`).

    Raises:
        SAMLError: a profile of another model, or one that is damaged.
    """
    distinct = list({id(s): s for s in speakers}.values())
    if len(distinct) == 1:
        with nullcontext() if distinct[0] is None else distinct[0].applied(model):
            yield
        return
    for speaker in distinct:
        if speaker is not None:
            speaker.check(model)
    saml = compression_of(model)
    layers, context, short = saml.layers, saml.context, saml.short_windows
    places = [next(i for i, s in enumerate(distinct) if s is speaker) for speaker in speakers]
    values = [_values(model, speaker) for speaker in distinct]
    try:
        for name, layer in layers.items():
            layer.speaker_experts = _stack(name, layer, values, distinct)
        context.speakers = torch.tensor(
            places, dtype=torch.int32, device=next(iter(layers.values())).lora_a.device
        )
        saml.short_windows = hears_short_windows(model, distinct[0])
        yield
    finally:
        for layer in layers.values():
            layer.speaker_experts = None
        context.speakers = None
        saml.short_windows = short


def _values(model: nn.Module, speaker: Speaker) -> dict[str, Tensor]:
    """Experts, routers and, as `<layer>.offset`, offsets by name."""
    if speaker is not None and speaker.kind == "experts":
        return speaker.experts(model)
    saml = compression_of(model)
    values: dict[str, Tensor] = {n: p.detach() for n, p in saml.experts().items()}
    if speaker is not None:
        return values | {f"{name}.offset": t for name, t in speaker.offsets(model).items()}
    own = ((name, router.offset) for name, router in saml.routers.items())
    return values | {f"{name}.offset": t.detach() for name, t in own if t is not None}


def _stack(
    name: str,
    layer: SAMLLinear,
    values: Sequence[dict[str, Tensor]],
    speakers: Sequence[Speaker],
) -> SpeakerExperts:
    """One layer's part of all speakers, padded to the most experts that one of them has.

    On the CPU the experts stay in int8 where every speaker's profile has all of them so.
    """
    like = layer.lora_a
    a, b, router = (
        [value[f"{name}.{part}"].to(like) for value in values]
        for part in ("lora_a", "lora_b", "router.weight")
    )
    counts = [len(t) for t in a]
    most = max(counts)
    offsets = None
    if len(set(counts)) > 1 or any(f"{name}.offset" in value for value in values):
        rows = [
            value.get(f"{name}.offset", like.new_zeros(n)).to(like)
            for value, n in zip(values, counts, strict=True)
        ]
        offsets = torch.stack([F.pad(t, (0, most - len(t)), value=-torch.inf) for t in rows])
    stacked_router = torch.stack([_padded(t, most) for t in router])
    if like.device.type == "cpu" and like.dtype == torch.float32 and layer.config.mix == "sum":
        stored = [
            _joined([_stored(speaker, f"{name}.{part}", shape) for speaker in speakers])
            for part, shape in (("lora_a", layer.lora_a.shape), ("lora_b", layer.lora_b.shape))
        ]
        if (
            stored[0] is not None
            and stored[1] is not None
            and native.serves(layer.weight)
            and native.serves_speakers(stored[0], stored[1])
        ):
            return SpeakerExperts(stored[0], stored[1], stacked_router, offsets)
    stacked_b = torch.stack([_padded(t, most) for t in b])
    if like.device.type == "cpu":  # as grouped rows read it
        stacked_b = stacked_b.transpose(1, 2).contiguous().transpose(1, 2)
    return SpeakerExperts(
        torch.stack([_padded(t, most) for t in a]),
        stacked_b,
        stacked_router,
        offsets,
    )


def _stored(speaker: Speaker, name: str, shape: torch.Size) -> QuantizedTensor | None:
    """One speaker's experts of a layer as the profile holds them, where that is in int8."""
    if speaker is None or speaker.kind != "experts" or speaker.kept or name in speaker.tensors:
        return None
    return int8_expert(speaker.tensors, name, shape)


def _joined(parts: Sequence[QuantizedTensor | None]) -> QuantizedTensor | None:
    """[S, ...] of all speakers' [...]; None where one is missing or a block would span two."""
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or found[0].codes.numel() % EXPERT_BLOCK:
        return None
    codes = torch.cat([part.codes for part in found])
    scales = torch.cat([part.absmax for part in found])
    shape = (len(found), *found[0].shape)
    return QuantizedTensor(codes, scales, None, None, shape, "int8", EXPERT_BLOCK)


def _padded(experts: Tensor, count: int) -> Tensor:
    """[E, ...] with experts of zeros up to `count`."""
    missing = experts.new_zeros(count - len(experts), *experts.shape[1:])
    return torch.cat((experts, missing)) if len(missing) else experts
