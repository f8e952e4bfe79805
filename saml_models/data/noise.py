"""What surrounds a voice: noise, other voices, and the room and microphone it is heard through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from saml_models.data.audio import SAMPLE_RATE

__all__ = ["BABBLERS", "babble", "hum", "in_room", "mixed", "pink"]

BABBLERS = 4  # voices that babble is mixed from
HARMONICS = 8
REVERBERATION = (0.1, 0.6)  # seconds in which a room's response falls by 60 dB
DIRECT = (0.0, 15.0)  # dB of the voice itself over what the room adds
EARLIEST = 0.002  # seconds after which the first echoes arrive
BANDS = 8  # of a microphone's response, evenly spaced in octaves from 60 Hz on
UNEVEN = 4.0  # dB, the standard deviation of a band's gain


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


def in_room(
    samples: npt.NDArray[np.floating], draw: np.random.Generator
) -> npt.NDArray[np.float32]:
    """A clip as it sounds in some room through some microphone, as long and as loud as it was.

    The room's response is white noise that decays exponentially after the voice itself (J. D.
    Polack, 1988); the microphone's is smooth over frequency.
    """
    seconds = draw.uniform(*REVERBERATION)
    time = np.arange(1, int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    echoes = draw.standard_normal(len(time)) * 10 ** (-3 * time / seconds) * (time > EARLIEST)
    energy = 10 ** (-draw.uniform(*DIRECT) / 10)
    response = np.concatenate(([1.0], echoes * np.sqrt(energy / np.sum(echoes**2))))
    size = 1 << (len(samples) + len(response)).bit_length()
    heard = np.fft.rfft(samples, size) * np.fft.rfft(response, size)
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    bands = np.geomspace(60, SAMPLE_RATE / 2, BANDS)
    decibels = np.interp(frequencies, bands, draw.normal(0, UNEVEN, BANDS))
    found = np.fft.irfft(heard * 10 ** (decibels / 20), size)[: len(samples)]
    power, own = (float(np.mean(np.square(one, dtype=np.float64))) for one in (samples, found))
    found *= np.sqrt(power / max(own, 1e-12))
    return (found / max(1.0, float(np.abs(found).max()))).astype(np.float32)
