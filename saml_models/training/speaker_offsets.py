"""Speaker-adaptive training: while experts are pretrained, each voice has gates of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from saml_kernels.errors import SAMLError
from saml_kernels.layers.routers import SpeakerRouter
from saml_models.compress.layers import compression_of
from saml_models.training.batches import Sample, speaker_numbers

__all__ = ["check_routers", "speaker_offsets"]


@contextmanager
def speaker_offsets(model: Any, samples: Sequence[Sample]) -> Iterator[None]:
    """Within the block each router has an offset [S + 1, E] for S speakers, from zero, that learns.

    What a voice needs of the experts is learnt there, beside what all voices need: LHUC's speaker
    scales (arXiv 2206.12045) with gates in their place, so that a profile of kind "gates" finds
    experts that are made to be told apart by it.

    Raises:
        SAMLError: the layers have no router that looks at what is said.
    """
    check_routers(model)
    routers = compression_of(model).routers.values()
    count = len(speaker_numbers(samples)) + 1
    try:
        for router in routers:
            like = router.weight
            router.offset = torch.zeros(count, len(like), device=like.device, requires_grad=True)
        yield
    finally:
        for router in routers:
            router.offset = None


def check_routers(model: Any) -> None:
    """Refuse layers whose routers look at nothing, or that have none of their own.

    Raises:
        SAMLError: that is so.
    """
    routers = compression_of(model).routers.values()
    if not routers or any(isinstance(router, SpeakerRouter) for router in routers):
        raise SAMLError(
            "speaker_rate: offsets by speaker are added to what a router sees; use router='token' "
            "or 'utterance'"
        )
