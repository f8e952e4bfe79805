"""Reading speech: any file that libsndfile reads, as 16 kHz mono float32."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from saml_kernels.errors import SAMLError, SAMLWarning

__all__ = ["AUDIO_SUFFIXES", "SAMPLE_RATE", "check_audio", "load_audio"]

SAMPLE_RATE = 16_000
"""Samples a second of everything that `load_audio` returns: the rate Whisper was trained on."""

AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".sph")
"""File names that a folder of speech is searched for, in the order they are preferred."""

# Reading in blocks keeps memory bounded by the samples there are, not by what a header claims.
_BLOCK = 1 << 18
_LOWEST_RATE = 1_000
# A segment may end this much after its recording does: transcripts are rounded by hand.
_OVERSHOOT_SECONDS = 0.5
_CANCELLED = 0.01  # of the channels' power, left of them in their average


def load_audio(
    path: str | os.PathLike[str], start: float | None = None, end: float | None = None
) -> npt.NDArray[np.float32]:
    """Read a recording, or the part from `start` to `end`, as mono speech at 16 kHz.

    Args:
        path: a file that libsndfile reads (WAV, FLAC, MP3, Ogg, NIST SPHERE, ...), of any sample
            rate and any number of channels; the channels are averaged.
        start: seconds from the beginning; None is the beginning.
        end: seconds from the beginning; None is the end. Only the part asked for is decoded
            (an MP3 file from its beginning).

    Returns:
        float32 [samples], nominally within -1..1.

    Raises:
        SAMLError: no such file, a folder, not audio, damaged, empty, NaN or infinite samples, or
            times outside the recording.
    """
    path = Path(path)
    if path.is_dir():
        raise SAMLError(f"{path}: is a folder; expected one audio file (WAV, FLAC, MP3, ...)")
    if not os.path.isfile(path):
        raise SAMLError(f"{path}: no such file; expected an audio file (WAV, FLAC, MP3, ...)")
    if path.stat().st_size == 0:
        raise SAMLError(f"{path}: empty file (0 bytes); expected recorded speech")
    try:
        # Opened by Python, because libsndfile reports an unreadable file as an unknown format.
        with open(path, "rb") as raw, soundfile.SoundFile(raw) as file:
            rate = file.samplerate
            if rate < _LOWEST_RATE:
                raise SAMLError(f"{path}: {rate} samples a second; speech needs {_LOWEST_RATE}")
            samples = _read_mono(file, path, start, end)
    except (soundfile.SoundFileError, TypeError, MemoryError) as error:
        # TypeError: soundfile asks for the format of a headerless .raw file.
        # MemoryError: an MP3 header that claims more than there is.
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise SAMLError(
            f"{path}: cannot be read as audio ({reason}); expected WAV, FLAC, MP3, Ogg or SPHERE"
        ) from error
    check_audio(samples, str(path))
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE)
        check_audio(samples, str(path))
    return samples


def check_audio(array: npt.NDArray[np.floating], name: str) -> None:
    """Refuse what no recogniser can hear; silence is allowed.

    Args:
        array: floating-point samples [samples].
        name: what to call the recording in the message.

    Raises:
        SAMLError: not one channel of floating-point samples, no samples at all, NaN or infinity.
    """
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.floating):
        raise SAMLError(
            f"{name}: {array.dtype} of shape {list(array.shape)}; expected floating-point [samples]"
        )
    if array.size == 0:
        raise SAMLError(f"{name}: empty audio (no samples); expected recorded speech")
    finite = np.isfinite(array)
    if not finite.all():
        first = int(np.argmin(finite))
        count = int(array.size - np.count_nonzero(finite))
        raise SAMLError(
            f"{name}: {count} samples are NaN or infinite, the first is number {first}; "
            "expected finite samples: export the recording again"
        )


def _read_mono(
    file: soundfile.SoundFile, path: Path, start: float | None, end: float | None
) -> npt.NDArray[np.float32]:
    """Decode [start, end) of an open file, float32 [samples] at the file's own rate."""
    seconds = file.frames / file.samplerate
    begin = 0.0 if start is None else float(start)
    stop = seconds if end is None else float(end)
    if start is not None or end is not None:
        if not 0 <= begin < stop:
            raise SAMLError(f"{path}: segment {begin:g} to {stop:g} s; expected 0 <= start < end")
        if begin >= seconds or stop > seconds + _OVERSHOOT_SECONDS:
            raise SAMLError(
                f"{path}: segment {begin:g} to {stop:g} s lies outside the recording, "
                f"which lasts {seconds:.2f} s"
            )
    first = round(begin * file.samplerate)
    left = round(min(stop, seconds) * file.samplerate) - first
    if file.subtype.startswith("MPEG"):
        # A frame of MP3 borrows bits from those before it and decodes wrongly after a seek, which
        # soundfile does after every read: read once, from the beginning.
        whole = file.read(max(first + left, 0), dtype="float32", always_2d=True)
        return _mono(whole[first:], path)
    if first:
        file.seek(min(first, file.frames))
    blocks = [np.zeros(0, dtype=np.float32)]
    while left > 0:
        block = _mono(file.read(min(left, _BLOCK), dtype="float32", always_2d=True), path)
        if not len(block):
            break
        left -= len(block)
        blocks.append(block)
    return np.concatenate(blocks)


def _mono(frames: npt.NDArray[np.float32], path: Path) -> npt.NDArray[np.float32]:
    """Average the channels of [samples, channels]; warns where they cancel each other."""
    if frames.shape[1] == 1:
        return frames[:, 0].copy()
    mono = frames.mean(axis=1)
    if np.square(mono).sum() < _CANCELLED * np.square(frames).mean(axis=1).sum():
        warnings.warn(
            f"{path}: its channels cancel each other, so that little is left to hear; invert one "
            "of two, or give a single channel",
            SAMLWarning,
            stacklevel=2,
        )
    return mono
