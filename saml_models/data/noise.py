"""Noise mixed into clips: white, pink, a mains hum, and other voices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from saml_models.data.audio import SAMPLE_RATE

__all__ = ["BABBLERS", "babble", "hum", "mixed", "pink"]

BABBLERS = 4  # voices that babble is mixed from
HARMONICS = 8


def mixed(
    samples: npt.NDArray[np.floating], noise: npt.NDArray[np.float64], decibels: float
) -> npt.NDArray[np.float32]:
    """A clip with noise at a ratio of powers, scaled down where it would clip."""
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    own = float(np.mean(np.square(noise, dtype=np.float64)))
    ratio = 10 ** (decibels / 10)
    both = samples + noise * np.sqrt(power / max(own, 1e-12) / ratio)
    return (both / max(1.0, float(np.abs(both).max()))).astype(np.float32)


def pink(white: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """White noise filtered to a power that falls by 3 dB an octave."""
    spectrum = np.fft.rfft(white)
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    spectrum[0] = 0
    return np.fft.irfft(spectrum, len(white))


def hum(length: int, draw: np.random.Generator) -> npt.NDArray[np.float64]:
    """50 or 60 Hz and harmonics of random strength, at 16 kHz."""
    base = (50.0, 60.0)[draw.integers(2)]
    time = np.arange(length) / SAMPLE_RATE
    found = np.zeros(length)
    for harmonic in range(1, HARMONICS + 1):
        phase = draw.uniform(0, 2 * np.pi)
        found += draw.uniform() / harmonic * np.sin(2 * np.pi * base * harmonic * time + phase)
    return found


def babble(
    voices: Sequence[npt.NDArray[np.floating]], length: int, draw: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Some voices at once, each begun somewhere and repeated to the length."""
    found = np.zeros(length)
    for voice in voices:
        clip = np.roll(voice.astype(np.float64), draw.integers(len(voice)))
        found += np.resize(clip, length) / max(float(np.std(clip)), 1e-6)
    return found
