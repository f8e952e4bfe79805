"""Audio that libsndfile does not read, by PyAV where it is installed: M4A, MP4, WebM, AAC, ..."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from saml_kernels.errors import SAMLError

__all__ = ["Media", "has_pyav"]

# Without those that open other files or addresses, as playlists do, or that take text for pictures.
_DEMUXERS = (
    "aac,ac3,aiff,alac,amr,ape,asf,au,avi,caf,eac3,flac,flv,loas,matroska,mov,mp3,mpeg,mpegts,"
    "ogg,tta,w64,wav,webm,wv"
)
_CANCELLED = 0.01  # of the channels' power, left of them in their average
_SCALES = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}


def has_pyav() -> bool:
    """Whether PyAV can be imported."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


class Downmix:
    """Averages channels, and notices where they cancel each other."""

    def __init__(self) -> None:
        self._given = self._kept = 0.0

    def __call__(self, frames: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[samples, channels] -> [samples]."""
        if frames.shape[1] == 1:
            return frames[:, 0].copy()
        mono = frames.mean(axis=1, dtype=np.float32)
        self._given += float(np.square(frames, dtype=np.float64).mean(axis=1).sum())
        self._kept += float(np.square(mono, dtype=np.float64).sum())
        return mono

    @property
    def cancelled(self) -> bool:
        """Whether next to nothing is left of what the channels hold."""
        return self._kept < _CANCELLED * self._given


class Media:
    """A file that PyAV reads: its first audio track, decoded as it is iterated over.

    Attributes:
        claim: seconds that the container promises; None where it only estimates them.
        rate: samples a second that the container says; 0 where it does not.
        tracks: of audio.
        lost: seconds of packets that could not be decoded, so far.

    Raises:
        SAMLError: not a format with audio in it; the message is the reason alone.
    """

    def __init__(
        self, file: io.RawIOBase | BinaryIO, mix: Downmix, largest: int | None = None
    ) -> None:
        """Open a file.

        Args:
            file: binary, at its beginning; can seek.
            mix: takes the channels.
            largest: bytes of a packet; one of more, which takes many times its size decoded, is
                refused. None is any.
        """
        av: Any = import_module("av")
        self._av, self._mix, self._largest = av, mix, largest
        try:
            options = {"format_whitelist": _DEMUXERS}
            self._container: Any = av.open(file, "r", metadata_errors="ignore", options=options)
        except (av.FFmpegError, ValueError) as error:
            raise SAMLError(getattr(error, "strerror", None) or str(error)) from error
        self.tracks = len(self._container.streams.audio)
        self.lost = 0.0
        if not self.tracks:
            self._container.close()
            raise SAMLError("there is no audio in it")
        stream = self._container.streams.audio[0]
        self.rate = int(stream.rate or 0)
        # A bare stream of frames says no length: FFmpeg guesses one from the bitrate.
        guessed = self._container.format.flags & av.format.Flags.generic_index.value
        self.claim: float | None = None
        if not guessed and stream.duration:
            self.claim = float(stream.duration * stream.time_base)
        elif not guessed and self._container.duration and not self._container.streams.video:
            self.claim = self._container.duration / av.time_base

    def __iter__(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Samples a second, and the average of the channels [samples]; a damaged packet is left."""
        with self._container:
            for packet in self._packets():
                if self._largest is not None and packet.size > self._largest:
                    raise SAMLError(
                        f"a packet of {packet.size:,} bytes; expected at most {self._largest:,}"
                    )
                try:
                    frames = packet.decode()
                except self._av.FFmpegError:
                    self.lost += float((packet.duration or 0) * packet.time_base)
                    continue
                for frame in frames:
                    yield frame.sample_rate, self._mix(_channels(frame))

    def _packets(self) -> Iterator[Any]:
        try:
            yield from self._container.demux(self._container.streams.audio[0])
        except self._av.FFmpegError:  # the file ends, or makes no sense, from here on
            return


def _channels(frame: Any) -> npt.NDArray[np.float32]:
    """[samples, channels]: FFmpeg's own mixing adds them up to 1.41 times their average."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    kind = frame.format.name.removesuffix("p")
    scaled = values.astype(np.float32) / np.float32(_SCALES[kind])
    if kind == "u8":
        scaled -= 1
    return scaled.T
