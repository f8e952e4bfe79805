"""Whether there is speech to be heard at all: one rule for clips and for recordings with times.

A recogniser that is given silence or noise answers all the same ("you"). Energy settles the clear
cases: what is nowhere louder than a digital floor is silent, and speech has loud and quiet places.
Between them the model is asked for its no-speech probability, where it has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from saml_models.data.audio import SAMPLE_RATE

__all__ = ["FRAME", "frame_power", "has_speech"]

FRAME = SAMPLE_RATE // 40  # 25 ms
LOUDEST = 5  # the level of the fifth loudest frame: no click lasts so long
FLOOR = -70.0  # dB of full scale; quieter frames hold dither and digital silence
SPEECH = 20.0  # dB between loud and quiet places, from which the energy is taken for speech's
STEADY = 6.0  # dB up to which it is noise, for models without a no-speech probability
NO_SPEECH = 0.6  # openai-whisper's threshold


def frame_power(clip: npt.NDArray[np.floating[Any]], width: int = FRAME) -> npt.NDArray[np.float64]:
    """Mean square of each whole frame of `width` samples, its mean left out: [frames]."""
    frames = clip[: len(clip) // width * width].reshape(-1, width)
    return np.square(frames - frames.mean(1, keepdims=True, dtype=np.float64)).mean(1)


def has_speech(clip: npt.NDArray[np.floating[Any]], no_speech: Callable[[], float | None]) -> bool:
    """Whether a clip is worth decoding.

    Args:
        clip: [samples] at 16 kHz, nominally within -1..1.
        no_speech: asked where energy cannot tell: the probability that there is no speech, or None.
    """
    if not len(clip):  # what follows the last cue of a recording
        return False
    power = frame_power(clip, min(FRAME, len(clip)))
    levels = np.sort(10 * np.log10(power + 1e-12))
    loud = levels[-min(LOUDEST, len(levels))]
    if loud < FLOOR:
        return False
    spread = loud - np.percentile(levels[levels >= FLOOR], 5)
    if spread >= SPEECH:
        return True
    probability = no_speech()
    return bool(spread > STEADY if probability is None else probability < NO_SPEECH)
