"""Long recordings without text, cut where they are quietest."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from saml_models.data.audio import MAX_SECONDS, SAMPLE_RATE
from saml_models.data.corpora import Utterance
from saml_models.data.silence import FRAME, frame_power

__all__ = ["cut_at_pauses", "quietest_places"]

PAUSE = 12  # frames that are quiet together
SHORTEST, LONGEST = 5.0, 20.0  # seconds between two cuts


def quietest_places(clip: npt.NDArray[np.floating[Any]]) -> list[int]:
    """Where to cut a recording into pieces of 5 to 20 s; the last may be shorter.

    Args:
        clip: [samples] at 16 kHz.

    Returns:
        Samples, rising, without the two ends: each is the middle of the 0.3 s with the least energy
        among those that may come next.
    """
    count = len(clip) // FRAME
    shortest, longest = (int(seconds * SAMPLE_RATE / FRAME) for seconds in (SHORTEST, LONGEST))
    if count <= longest:
        return []
    quiet = np.convolve(frame_power(clip), np.ones(PAUSE), "same")
    places, last = list[int](), 0
    while count - last > longest:
        last += shortest + int(np.argmin(quiet[last + shortest : last + longest + 1]))
        places.append(last * FRAME)
    return places


def cut_at_pauses(recording: Utterance) -> list[Utterance]:
    """The recording itself where it is at most 30 s long, else its pieces, without text.

    Both hold their samples: the file is read once.

    Raises:
        SAMLError: audio that cannot be read.
    """
    clip = recording.load()
    if len(clip) <= MAX_SECONDS * SAMPLE_RATE:
        return [replace(recording, samples=clip)]
    edges = [0, *quietest_places(clip), len(clip)]
    return [
        replace(
            recording,
            id=f"{recording.id}#{number}",
            text="",
            duration=(end - begin) / SAMPLE_RATE,
            samples=clip[begin:end],
        )
        for number, (begin, end) in enumerate(pairwise(edges))
    ]
