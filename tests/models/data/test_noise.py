"""Noise by what it is to be: power, spectrum, and the ratio it is mixed at."""

from __future__ import annotations

import numpy as np
import pytest

from saml_models.data.noise import HARMONICS, babble, hum, in_room, mixed, pink

LENGTH = 1 << 16


@pytest.mark.parametrize("decibels", [-5.0, 0.0, 15.0])
def test_the_ratio_of_powers(decibels: float) -> None:
    draw = np.random.default_rng(0)
    speech = draw.normal(0, 0.01, LENGTH).astype(np.float32)
    noise = draw.normal(0, 3, LENGTH)
    both = mixed(speech, noise, decibels)
    assert both.dtype == np.float32
    left = both.astype(np.float64) - speech
    ratio = 10 * np.log10(np.mean(speech.astype(np.float64) ** 2) / np.mean(left**2))
    assert ratio == pytest.approx(decibels, abs=0.01)


def test_it_never_clips_and_silence_stays() -> None:
    loud = np.sin(np.arange(LENGTH) / 10).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=LENGTH)
    assert np.abs(mixed(loud, noise, 0.0)).max() == pytest.approx(1.0)
    assert not mixed(np.zeros(100, np.float32), noise[:100], 5.0).any()


def test_pink_noise_falls_by_three_decibels_an_octave() -> None:
    white = np.random.default_rng(2).normal(size=LENGTH)
    power = np.abs(np.fft.rfft(pink(white))) ** 2
    octaves = [power[1 << k : 2 << k].mean() for k in range(6, 14)]
    slope = np.polyfit(range(8), 10 * np.log10(octaves), 1)[0]
    assert slope == pytest.approx(-3.01, abs=0.2)


def test_hum_is_of_the_mains() -> None:
    found = hum(16000, np.random.default_rng(3))
    power = np.abs(np.fft.rfft(found)) ** 2
    base = int(power[1:].argmax()) + 1
    peaks = {int(k) for k in np.flatnonzero(power > power.max() * 1e-6)}
    assert base in (50, 60, 100, 120, 150, 180)
    assert any(peaks <= {mains * n for n in range(1, HARMONICS + 1)} for mains in (50, 60))


def test_babble_is_of_all_voices_alike() -> None:
    draw = np.random.default_rng(4)
    quiet, loud = draw.normal(0, 0.001, 700), draw.normal(0, 1, 900)
    found = babble([quiet, loud], LENGTH, draw)
    assert found.shape == (LENGTH,)
    assert np.var(found) == pytest.approx(2, rel=0.1)


def test_a_room_follows_its_voice_and_is_as_loud() -> None:
    """Nothing is heard before the voice begins; what comes after it dies away."""
    clip = np.zeros(LENGTH, np.float32)
    clip[8000:9600] = np.random.default_rng(3).normal(0, 0.05, 1600)
    heard = in_room(clip, np.random.default_rng(4))
    assert heard.dtype == np.float32 and heard.shape == clip.shape
    assert np.sqrt(np.mean(heard**2)) == pytest.approx(np.sqrt(np.mean(clip**2)), rel=1e-3)
    power = (heard.astype(np.float64) ** 2).reshape(-1, 1024).mean(1)
    assert power[:7].max() < 1e-4 * power[8]
    after = power[10:20]
    assert after[0] > 10 * after[-1] > 0
    assert not in_room(np.zeros(1000, np.float32), np.random.default_rng(5)).any()
    assert np.array_equal(heard, in_room(clip, np.random.default_rng(4)))
