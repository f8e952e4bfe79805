"""Recordings from strangers: decoded with bounds on what they may take."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soxr

from saml_kernels.errors import SAMLError
from saml_models.data.audio import SAMPLE_RATE
from saml_models.data.media import Downmix, Media

__all__ = ["Memory", "MemoryFull", "decode_upload"]

RATES = 1_000, 384_000  # samples a second that a recording may have
LARGEST = 2**22  # bytes of a packet
_SAMPLE = 4  # bytes


class MemoryFull(SAMLError):
    """Decoded recordings take all the memory there is for them."""


class Memory:
    """Bytes of decoded audio that are held, of those that may be."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Hold so many more.

        Raises:
            MemoryFull: there is no room.
        """
        with self._lock:
            if self.held + size > self.limit:
                raise MemoryFull(
                    f"decoded audio: {self.held + size:,} bytes; the limit of memory is "
                    f"{self.limit:,}: try again later, or send shorter recordings"
                )
            self.held += size

    def give(self, size: int) -> None:
        """Hold so many fewer."""
        with self._lock:
            self.held -= size


def decode_upload(
    file: BinaryIO, max_seconds: float, take: Callable[[int], None]
) -> npt.NDArray[np.float32]:
    """A recording as mono speech at 16 kHz: float32 [samples].

    Args:
        file: WAV, FLAC, MP3, Ogg, M4A, MP4, WebM or what else PyAV reads; can seek.
        max_seconds: of it.
        take: called with bytes before they are held, all of them together what is returned.

    Raises:
        SAMLError: not audio, empty, too long, of a rate or of packets that no recording has, NaN or
            infinite samples; and what `take` raises.
    """
    media = Media(file, Downmix(), LARGEST)
    if media.rate:
        _check_rate(media.rate)
    _check_length(media.claim or 0.0, max_seconds)
    # Memory is used where it is written: a short recording does not take the room of a long one.
    room = np.empty(int(max_seconds * SAMPLE_RATE) + SAMPLE_RATE, np.float32)
    count, rate = 0, 0
    stream: soxr.ResampleStream | None = None

    def keep(samples: npt.NDArray[np.float32]) -> None:
        nonlocal count
        _check_length((count + len(samples)) / SAMPLE_RATE, max_seconds)
        take(samples.nbytes)
        room[count : count + len(samples)] = samples
        count += len(samples)

    for found, block in media:
        _check_rate(found)
        if found != rate:
            if stream is not None:
                keep(stream.resample_chunk(np.zeros(0, np.float32), last=True))
            rate = found
            stream = None
            if rate != SAMPLE_RATE:
                stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
        step = 10 * rate  # at most 10 s at a time: a low rate becomes many samples
        for start in range(0, len(block), step):
            part = block[start : start + step]
            keep(part if stream is None else stream.resample_chunk(part))
    if stream is not None:
        keep(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    if not count:
        raise SAMLError("there is no audio in it that can be decoded")
    clip = room[:count]
    if not np.isfinite(clip).all():
        raise SAMLError("some of its samples are NaN or infinite")
    return clip if 4 * count > len(room) else clip.copy()


def _check_rate(rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise SAMLError(f"{rate:,} samples a second; expected {RATES[0]:,} to {RATES[1]:,}")


def _check_length(seconds: float, most: float) -> None:
    if seconds > most + 1:
        raise SAMLError(
            f"it lasts {seconds:,.0f} s or more; the limit is {most:,.0f} seconds: send it in parts"
        )
