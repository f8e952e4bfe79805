"""What lies in an audio file: recordings joined end to end, wrong headers, what is missing.

libsndfile believes the first header: it hears the first of two files joined by `cat`, and as much
of an MP3 without its Xing frame as the first frame's bitrate promises. So the container is walked
here, and each stretch of bytes is decoded by itself, below a header that tells the truth.
"""

from __future__ import annotations

import functools
import io
import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = ["Layout", "Stretch", "View", "layout_of"]

Bytes = bytes | mmap.mmap  # which slice and find alike

# A length that nobody knew when the header was written: recorders and pipes leave these.
_UNKNOWN_FROM = 0x7FFFF000
_MPEG_SUFFIXES = (".mp3", ".mp2", ".mpga")
_PROBE = 1 << 16
_LEFTOVER = 3  # MPEG frames: fewer of them alone are padding, or no audio at all


@dataclass(frozen=True)
class Stretch:
    """Bytes `start` to `end` of a file, one recording; `head` is put in front of them.

    Where a header says how long its samples are, they begin at `samples`, `missing` bytes of them
    are not in the file, and `beyond` bytes follow `end` that the header does not know of.
    """

    start: int
    end: int
    head: bytes = b""
    samples: int = 0
    missing: int = 0
    beyond: int = 0


@dataclass
class Layout:
    """The recordings of a file, in order, and what keeps them from being heard whole.

    Attributes:
        stretches: at least one.
        missing: seconds that are promised and not there, beside those of the stretches.
        notes: what else there is to say, each one clause.
    """

    stretches: list[Stretch]
    missing: float = 0.0
    notes: list[str] = field(default_factory=list)


class View(io.RawIOBase):
    """A stretch of a file as a file of its own, for libsndfile and PyAV; nothing is copied."""

    def __init__(self, data: Bytes, stretch: Stretch) -> None:
        self._data, self._stretch = data, stretch
        self._size = len(stretch.head) + stretch.end - stretch.start
        self._at = 0

    def readable(self) -> bool:
        """True: part of the protocol of binary files."""
        return True

    def seekable(self) -> bool:
        """True: part of the protocol of binary files."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte and give its place, as `io.RawIOBase.seek` does."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """The head first, then the file."""
        head, start = self._stretch.head, self._stretch.start
        if self._at < len(head):
            part = head[self._at : self._at + len(buffer)]
        else:
            first = start + self._at - len(head)
            part = self._data[first : min(first + len(buffer), self._stretch.end)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def layout_of(data: Bytes, suffix: str = "") -> Layout:
    """Walk a file's container; a format that is not known here is one stretch.

    Args:
        data: the whole file.
        suffix: of its name, lower case: an MP3 that begins within a frame has no other mark.
    """
    start = _after_tags(data, 0)
    mark = data[start : start + 12]
    if mark[:4] == b"OggS":
        return _ogg(data, start)
    if mark[:4] == b"fLaC":
        return _flac(data, start)
    if _is_chunked(mark):
        return _chunked(data, start)
    if start or _synced(data, start) or suffix in _MPEG_SUFFIXES:
        return _mpeg(data)
    return _declared(data)


def _number(data: Bytes, at: int, order: Literal["little", "big"] = "big") -> int:
    return int.from_bytes(data[at : at + 4], order)


def _after_tags(data: Bytes, at: int) -> int:
    """Where the ID3 and APE tags that begin at `at` end."""
    while True:
        if data[at : at + 3] == b"ID3" and len(data) >= at + 10:
            size = functools.reduce(lambda n, b: n << 7 | b & 0x7F, data[at + 6 : at + 10], 0)
            at += 10 + size + (10 if data[at + 5] & 0x10 else 0)
        elif data[at : at + 3] == b"TAG":
            at += 128
        elif data[at : at + 8] == b"APETAGEX":
            header = _number(data, at + 20, "little") & 0x20000000
            at += 32 + (_number(data, at + 12, "little") if header else 0)
        else:
            return min(at, len(data))


# Ogg


def _ogg(data: Bytes, start: int) -> Layout:
    """A stretch for each link of a chain: pages that begin a stream, then the others."""
    audio = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")
    starts, begun, together, most = [start], False, 0, 0
    layout = Layout([])
    at = start
    while 0 <= at < len(data):
        count = data[at + 26] if at + 27 <= len(data) else 0
        body = at + 27 + count
        after = body + sum(data[at + 27 : body])
        if after > len(data) or at + 27 > len(data):
            layout.notes.append("the file is cut off within a page, and what followed is lost")
            break
        if data[at + 5] & 2:  # begins a stream
            if begun:
                starts.append(at)
                begun, together = False, 0
            together += data[body : body + 8].startswith(audio)
            most = max(most, together)
        else:
            begun = True
        at = after if data[after : after + 4] == b"OggS" else data.find(b"OggS", after)
    ends = [*starts[1:], len(data)]
    layout.stretches = [Stretch(a, b) for a, b in zip(starts, ends, strict=True)]
    if most > 1:
        layout.notes.append(f"it holds {most} streams at once, of which one is heard")
    return layout


# FLAC


def _flac(data: Bytes, start: int) -> Layout:
    starts, at = [start], start
    while (at := data.find(b"fLaC", at + 4)) >= 0:
        # STREAMINFO, 34 bytes long, comes first in every stream.
        if data[at + 4 : at + 5] in (b"\x00", b"\x80") and data[at + 5 : at + 8] == b"\0\0\x22":
            starts.append(at)
    ends = [*starts[1:], len(data)]
    return Layout([Stretch(a, b) for a, b in zip(starts, ends, strict=True)])


# WAV and AIFF


def _is_chunked(mark: bytes) -> bool:
    return (mark[:4] == b"RIFF" and mark[8:12] == b"WAVE") or (
        mark[:4] == b"FORM" and mark[8:12] in (b"AIFF", b"AIFC")
    )


def _chunked(data: Bytes, start: int) -> Layout:
    stretches = []
    while start < len(data):
        stretch, start = _one_chunked(data, start)
        stretches.append(stretch)
    return Layout(stretches)


def _one_chunked(data: Bytes, start: int) -> tuple[Stretch, int]:
    """The WAV or AIFF file that begins at `start`, and where the next one does."""
    order: Literal["little", "big"] = "little" if data[start : start + 4] == b"RIFF" else "big"
    at = start + 12
    while data[at : at + 4] not in (b"data", b"SSND"):
        if at + 8 > len(data):
            return Stretch(start, len(data)), len(data)
        size = _number(data, at + 4, order)
        at += 8 + size + size % 2
    size, body = _number(data, at + 4, order), at + 8
    following = _next_chunked(data, body)
    stop = body + size
    after = _after_chunks(data, stop + size % 2, following, order)
    empty = size <= 8 * (order == "big") and after < following
    if size >= _UNKNOWN_FROM or empty:
        real = min(following - body, 0xFFFFFFFF).to_bytes(4, order)
        return Stretch(body, following, data[start : at + 4] + real), following
    if stop > following:
        return Stretch(start, following, samples=body, missing=stop - following), following
    # Zeros are padding.
    beyond = following - after if any(data[after : min(following, after + _PROBE)]) else 0
    return Stretch(start, after, samples=body, beyond=beyond), following


def _next_chunked(data: Bytes, at: int) -> int:
    """Where another WAV or AIFF file begins, or the end."""
    starts = [len(data)]
    for kind in (b"WAVEfmt ", b"AIFFCOMM", b"AIFCFVER"):
        place = data.find(kind, at + 8)
        if place >= 0 and _is_chunked(data[place - 8 : place + 4]):
            starts.append(place - 8)
    return min(starts)


def _after_chunks(data: Bytes, at: int, stop: int, order: Literal["little", "big"]) -> int:
    """Where the chunks from `at` on end: at `stop` where all is well."""
    while at + 8 <= stop:
        after = at + 8 + _number(data, at + 4, order)
        if not all(0x20 <= byte < 0x7F for byte in data[at : at + 4]) or after > stop:
            return at
        at = min(stop, after + after % 2)
    return stop


# Others that say in their header where the samples end: NIST SPHERE, AU, RF64, W64, CAF


def _declared(data: Bytes) -> Layout:
    """The file, or those of its kind that are joined in it, by their headers' lengths."""
    stretches: list[Stretch] = []
    start = 0
    while start < len(data):
        first, last = _extent(data, start)
        unknown = last - first >= _UNKNOWN_FROM and last > len(data)
        if last <= first or unknown:
            stretches.append(Stretch(start, len(data)))
            break
        if last > len(data) or data[last : last + 4] == data[:4]:
            stop = min(last, len(data))
            stretches.append(Stretch(start, stop, samples=first, missing=last - stop))
            start = stop
            continue
        # libsndfile goes on to the end of these, whatever they say.
        heard = data[:4] in (b"NIST", b"riff") or not any(data[last : last + _PROBE])
        stop = len(data) if heard else last
        stretches.append(Stretch(start, stop, samples=first, beyond=len(data) - stop))
        break
    return Layout(stretches)


def _extent(data: Bytes, start: int) -> tuple[int, int]:
    """Where the samples begin and end, by the header at `start`; (0, 0) where it does not say."""
    top = data[start : start + 1024]
    if top[:8] == b"NIST_1A\n" and b"shorten" not in top:
        first = start + int(re.sub(rb"\D", b"", top[8:16]) or 0)
        fields = (rb"sample_count", rb"sample_n_bytes", rb"channel_count")
        found = [re.search(name + rb" -i (\d+)", top) for name in fields]
        return first, first + math.prod(int(m[1]) if m else 0 for m in found)
    if top[:4] == b".snd" and _number(top, 8) < _UNKNOWN_FROM:
        first = start + _number(top, 4)
        return first, first + _number(top, 8)
    if top[:4] == b"RF64" and top[12:16] == b"ds64" and (at := top.find(b"data", 48)) > 0:
        first = start + at + 8
        return first, first + int.from_bytes(top[28:36], "little")
    if top[:4] == b"riff" and top[24:28] == b"wave":
        return start + 24, start + int.from_bytes(top[16:24], "little")
    at = start + 8
    while top[:4] == b"caff" and at + 12 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 12], signed=True)
        if data[at : at + 4] == b"data" or size < 0:
            return at + 12, at + 12 + size
        at += 12 + size
    return 0, 0


# MPEG audio: MP3 and its elders


class _Frame(NamedTuple):
    """What a frame's four bytes say; `key` is what may not change within a stream."""

    key: tuple[int, int, int, bool]
    size: int
    seconds: float
    side: int  # bytes from the frame's beginning to a Xing tag


_BITRATES = {  # kbit/s, by (version 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@functools.lru_cache(maxsize=4096)
def _parsed(word: bytes) -> _Frame | None:
    number = int.from_bytes(word)
    version, layer = number >> 19 & 3, 4 - (number >> 17 & 3)
    bitrate, rate, mono = number >> 12 & 15, number >> 10 & 3, number >> 6 & 3 == 3
    synced = len(word) == 4 and number >> 21 == 0x7FF
    if not synced or version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    first = version == 3
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 384 if layer == 1 else 576 if layer == 3 and not first else 1152
    slot = 4 if layer == 1 else 1
    bits = samples // 8 * _BITRATES[first, layer][bitrate - 1] * 1000
    size = (bits // (hertz * slot) + (number >> 9 & 1)) * slot
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return _Frame((version, layer, rate, mono), size, samples / hertz, 4 + side)


def _synced(data: Bytes, at: int) -> _Frame | None:
    """The frame at `at`, if another of its kind, or the end of the file, follows it."""
    frame = _parsed(data[at : at + 4])
    if frame is None or at + frame.size == len(data):
        return frame
    following = _parsed(data[at + frame.size : at + frame.size + 4])
    return frame if following is not None and following.key == frame.key else None


@dataclass
class _Run:
    """Frames one after another; `claim` is how many its Xing or VBRI frame counts."""

    frame: _Frame
    start: int
    end: int
    count: int = 0
    claim: int | None = None
    xing: bytes = b""


def _mpeg(data: Bytes) -> Layout:
    """A stretch for each run of frames, below a Xing frame with the run's own length."""
    runs = [run for run in _runs(data) if run.claim is not None or run.count >= _LEFTOVER]
    if not any(run.count for run in runs):
        return Layout([Stretch(0, len(data))])
    owed: list[float] = []
    for run in runs:
        if run.claim is not None:
            owed.append(run.frame.seconds * (run.claim - run.count))
        elif owed:  # what follows damage is the rest of what was announced before it
            owed[-1] -= run.frame.seconds * run.count
    stretches = [Stretch(run.start, run.end, _head(run)) for run in runs if run.count]
    return Layout(stretches, missing=sum(max(0.0, seconds) for seconds in owed))


def _runs(data: Bytes) -> Iterator[_Run]:
    run: _Run | None = None
    at = 0
    while at < len(data):
        frame = _parsed(data[at : at + 4])
        if frame is None or (run is None and not _synced(data, at)):
            if run is not None:
                yield run
                run = None
            after = _after_tags(data, at)
            at = after if after > at else _next_frame(data, at + 1)
            continue
        if at + frame.size > len(data):  # cut off within it
            break
        claim, xing = _claim(data, at, frame)
        full = run is not None and run.claim is not None and run.count >= run.claim
        if run is None or claim is not None or full or run.frame.key != frame.key:
            if run is not None:
                yield run
            run = _Run(frame, at, at, claim=claim, xing=xing)
        if claim is None:
            run.count += 1
        else:
            run.start = at + frame.size
        at += frame.size
        run.end = at
    if run is not None:
        yield run


def _next_frame(data: Bytes, at: int) -> int:
    while (at := data.find(b"\xff", at)) >= 0:
        if _synced(data, at):
            return at
        at += 1
    return len(data)


def _claim(data: Bytes, at: int, frame: _Frame) -> tuple[int | None, bytes]:
    """How many frames a header frame counts, and that frame where mpg123 understands it."""
    if frame.key[1] != 3:
        return None, b""
    tag = at + frame.side
    if data[tag : tag + 4] in (b"Xing", b"Info"):
        counted = _number(data, tag + 4) & 1
        frames = data[at : at + frame.size] if counted else b""
        return (_number(data, tag + 8) if counted else 0), bytes(frames)
    if data[at + 36 : at + 40] == b"VBRI":
        return _number(data, at + 50), b""
    return None, b""


def _head(run: _Run) -> bytes:
    """A Xing frame that counts the run's own frames: the file's, for what else it says, or ours."""
    if run.frame.key[1] != 3:
        return b""
    side, size = run.frame.side, run.end - run.start
    if run.xing:
        head = bytearray(run.xing)
        head[side + 8 : side + 12] = run.count.to_bytes(4)
        if head[side + 7] & 2:
            head[side + 12 : side + 16] = (size + len(head)).to_bytes(4)
        return bytes(head)
    version, _, rate, mono = run.frame.key
    # Without checksum or padding, and of the highest bitrate, so that the tag fits.
    word = 0x7FF << 21 | version << 19 | 1 << 17 | 1 << 16 | 14 << 12 | rate << 10
    header = (word | (3 << 6 if mono else 0)).to_bytes(4)
    frame = _parsed(header)
    assert frame is not None
    body = header.ljust(side, b"\0") + b"Xing" + (1).to_bytes(4) + run.count.to_bytes(4)
    return body.ljust(frame.size, b"\0")
