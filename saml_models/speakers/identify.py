"""Who is speaking: clips beside the enrolled speakers, by the encoder's own states.

The bare quantised base hears the clip, without anybody's experts, so that all embeddings of a base
model are comparable. What is kept of a clip is mean and standard deviation over its audio of the
first encoder layer's output, which knows the voice and little of the words; of a speaker, the mean
over clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saml_kernels.errors import SAMLError
from saml_kernels.layers.linear import SAMLLinear
from saml_models.data.audio import MAX_SAMPLES
from saml_models.models.interface import SHORT_WINDOW_MARGIN, Clip, SpeechModel
from saml_models.speakers.profile import SpeakerProfile

__all__ = ["THRESHOLD", "Match", "distance", "embed", "identify"]

# `python -m bench identification`, 26 development speakers with five clips of each enrolled: the
# nearest is the right one for 95 % of the clips; 8.5 % are turned away, and a stranger, who has
# 25 chances, is taken for somebody in 35 %. Fewer enrolled are fewer chances.
THRESHOLD = 0.225


@dataclass(frozen=True)
class Match:
    """The nearest of the enrolled.

    Attributes:
        profile: theirs, or None where nobody is near enough.
        nearest: the name of the nearest, whether or not near enough.
        distance: to them, see `distance`.
        margin: how much farther the next is; None where only one is enrolled.
    """

    profile: SpeakerProfile | None
    nearest: str
    distance: float
    margin: float | None

    def __str__(self) -> str:  # noqa: D105
        numbers = f"distance {self.distance:.3f}, {THRESHOLD:.3f} at most"
        if self.margin is not None:
            numbers += f"; the next is {self.margin:.3f} farther"
        if self.profile is None:
            return f"none of them (nearest {self.nearest}: {numbers})"
        return f"{self.nearest} ({numbers})"


def identify(speech: SpeechModel, clip: Clip, profiles: Sequence[SpeakerProfile]) -> Match:
    """The enrolled speaker whose embedding is nearest to that of a clip's first 30 s.

    Args:
        speech: with SAML layers, that the profiles fit.
        clip: float32 [samples] at 16 kHz.
        profiles: at least one, each with an embedding.

    Raises:
        SAMLError: nobody to choose from, or a profile without an embedding or of another model.
    """
    if not profiles:
        raise SAMLError("speaker auto: nobody is enrolled")
    embedding = embed(speech, [clip])
    distances = []
    for profile in profiles:
        if profile.embedding is None:
            raise SAMLError(f"speaker {profile.name}: has no embedding; adapt again to enrol")
        if profile.embedding.shape != embedding.shape:
            raise SAMLError(f"speaker {profile.name}: has the embedding of another model")
        distances.append(distance(embedding, profile.embedding))
    order = sorted(range(len(distances)), key=lambda i: distances[i])
    best = order[0]
    margin = distances[order[1]] - distances[best] if len(order) > 1 else None
    near = distances[best] <= THRESHOLD
    chosen = profiles[best] if near else None
    return Match(chosen, profiles[best].name, distances[best], margin)


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square over dimensions of the means' difference, in standard deviations."""
    (mean_a, std_a), (mean_b, std_b) = one.float(), other.float()
    apart = (mean_a - mean_a.mean()) - (mean_b - mean_b.mean())
    spread = ((std_a.square() + std_b.square()) / 2).sqrt().clamp(min=1e-3)
    return float((apart / spread).square().mean().sqrt())


class _Heard(Exception):
    """The first layer's output is known."""


@torch.inference_mode()
def embed(speech: SpeechModel, clips: Sequence[Clip]) -> Tensor:
    """How a speaker sounds: float16 [2, d].

    Args:
        speech: with SAML layers or plain.
        clips: of one speaker, float32 [samples] at 16 kHz; of a longer one, the first 30 s.

    Raises:
        SAMLError: there are no clips.
    """
    if not clips:
        raise SAMLError("embedding: no clips; give at least one")
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)
        raise _Heard  # nothing behind the first layer is asked

    hook = speech.network.get_encoder().layers[0].register_forward_hook(keep)
    statistics = []
    device = speech.device
    try:
        with speech.evaluating(), _bare(speech.network):
            for clip in clips:
                states.clear()
                features, mask = speech.inputs([clip[:MAX_SAMPLES]], SHORT_WINDOW_MARGIN)
                start = torch.zeros(1, 1, dtype=torch.int64, device=device)
                with suppress(_Heard):
                    speech.outputs(features, mask, start, start[0])
                audio = speech.encoder_mask(mask)[0]
                audible = states[0][0, audio[: states[0].shape[1]]].float()
                statistics.append(torch.stack((audible.mean(0), audible.std(0, correction=0))))
    finally:
        hook.remove()
    return torch.stack(statistics).mean(0).to(torch.float16).cpu()


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """Within the block no layer has experts."""
    own = [(m, m.lora_a, m.lora_b) for m in model.modules() if isinstance(m, SAMLLinear)]
    try:
        for layer, a, b in own:
            layer.lora_a = nn.Parameter(a[:0], requires_grad=False)
            layer.lora_b = nn.Parameter(b[:0], requires_grad=False)
        yield
    finally:
        for layer, a, b in own:
            layer.lora_a, layer.lora_b = a, b
