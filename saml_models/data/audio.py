"""Reading speech: any file that libsndfile or PyAV reads, as 16 kHz mono float32."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from saml_kernels.errors import SAMLError, SAMLWarning, install
from saml_models.data.containers import Layout, Stretch, View, layout_of
from saml_models.data.media import Downmix, Media, has_pyav

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AUDIO_SUFFIXES",
    "SAMPLE_RATE",
    "audio_files",
    "check_audio",
    "load_audio",
    "warn_of_others",
]

SAMPLE_RATE = 16_000
"""Samples a second of everything that `load_audio` returns: the rate Whisper was trained on."""

MAX_SECONDS = 30
MAX_SAMPLES = MAX_SECONDS * SAMPLE_RATE
"""What is decoded at once, and the longest clip to learn from: Whisper's window."""

_BY_LIBSNDFILE = (
    ".flac", ".wav", ".mp3", ".ogg", ".sph", ".opus", ".oga", ".aiff", ".aif", ".aifc", ".au",
    ".snd", ".caf", ".w64", ".rf64", ".wave", ".mp2", ".mpga",
)  # fmt: skip
_BY_PYAV = (
    ".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".webm", ".mka", ".mkv", ".aac", ".ac3", ".amr",
    ".3gp", ".wma", ".avi", ".flv", ".spx", ".wv", ".ape", ".tta",
)  # fmt: skip
AUDIO_SUFFIXES = _BY_LIBSNDFILE + _BY_PYAV
"""File names that a folder of speech is searched for, in the order they are preferred."""

# What lies beside recordings: their transcripts and lists.
_COMPANIONS = (".txt", ".json", ".jsonl", ".srt", ".vtt", ".tsv", ".csv", ".stm", ".md")
_SHOWN = 5

_BLOCK = 1 << 14  # samples: what is lost, at most, before a place where a file is damaged
_LOWEST_RATE = 1_000
# A segment may end this much after its recording does: transcripts are rounded by hand.
_OVERSHOOT_SECONDS = 0.5
# Encoders pad, and headers round: a difference below this is none.
_TOLERANCE_SECONDS = 0.1

Audio: TypeAlias = "str | os.PathLike[str] | npt.NDArray[np.floating] | Tensor | Sequence[float]"
"""A file, or samples [samples]: 16 kHz and mono unless a rate is given."""

Block = tuple[int, npt.NDArray[np.float32]]  # samples a second, and samples, mono


def audio_files(folder: Path) -> list[Path]:
    """The audio files below a folder, sorted; one warning names what else is there.

    Raises:
        SAMLError: there is none that can be read.
    """
    inside = sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")
    readable = AUDIO_SUFFIXES if has_pyav() else _BY_LIBSNDFILE
    found = [p for p in inside if p.suffix.lower() in readable]
    left_out = _left_out([p for p in inside if p.suffix.lower() not in readable], folder)
    if not found:
        hint = f"; it holds {left_out}" if left_out else ""
        raise SAMLError(f"{folder}: no audio below it that can be read{hint}")
    if left_out:
        warnings.warn(f"{folder}: left out: {left_out}", SAMLWarning, stacklevel=2)
    return found


def warn_of_others(folder: Path) -> None:
    """One warning that names what lies in a folder and is neither audio nor goes with it."""
    inside = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != ".")
    left_out = _left_out([p for p in inside if p.suffix.lower() not in AUDIO_SUFFIXES], folder)
    if left_out:
        warnings.warn(f"{folder}: left out: {left_out}", SAMLWarning, stacklevel=2)


def _left_out(files: Sequence[Path], folder: Path) -> str:
    """Names, and why; transcripts and lists are not meant to be heard."""
    media = [p for p in files if p.suffix.lower() in AUDIO_SUFFIXES]
    others = [p for p in files if p.suffix.lower() not in (*AUDIO_SUFFIXES, *_COMPANIONS)]
    reasons = ((media, f"needs PyAV: {install('audio')}"), (others, "no audio file by its name"))
    return "; ".join(f"{_named(some, folder)} ({why})" for some, why in reasons if some)


def _named(files: Sequence[Path], folder: Path) -> str:
    """The first few, and how many more."""
    names = ", ".join(str(p.relative_to(folder)) for p in files[:_SHOWN])
    more = len(files) - _SHOWN
    return names + (f" and {more} more" if more > 0 else "")


def load_audio(
    path: str | os.PathLike[str], start: float | None = None, end: float | None = None
) -> npt.NDArray[np.float32]:
    """Read a recording, or the part from `start` to `end`, as mono speech at 16 kHz.

    Recordings joined end to end in one file are all heard. What a whole file holds and is not
    heard, because it is damaged, cut off or hidden by a wrong header, is a `SAMLWarning`.

    Args:
        path: a file that libsndfile reads (WAV, FLAC, MP3, Ogg, NIST SPHERE, ...) or, where it is
            installed, PyAV (M4A, MP4, WebM, ...), of any sample rate and any number of channels;
            the channels are averaged.
        start: seconds from the beginning; None is the beginning.
        end: seconds from the beginning; None is the end. Only the part asked for is decoded
            (an MP3 file, and what PyAV reads, from the beginning).

    Returns:
        float32 [samples], nominally within -1..1.

    Raises:
        SAMLError: no such file, a folder, not audio, damaged from the beginning, empty, NaN or
            infinite samples, or times outside the recording.
    """
    path = Path(path)
    if path.is_dir():
        raise SAMLError(f"{path}: is a folder; expected one audio file (WAV, FLAC, MP3, ...)")
    if not os.path.isfile(path):
        raise SAMLError(f"{path}: no such file; expected an audio file (WAV, FLAC, MP3, ...)")
    if path.stat().st_size == 0:
        raise SAMLError(f"{path}: empty file (0 bytes); expected recorded speech")
    begin, stop = float(start or 0.0), float("inf") if end is None else float(end)
    if not 0 <= begin < stop:
        raise SAMLError(f"{path}: segment {begin:g} to {stop:g} s; expected 0 <= start < end")
    # Opened by Python, because libsndfile reports an unreadable file as an unknown format.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        layout = layout_of(data, path.suffix.lower())
        mix = Downmix()
        blocks, seconds = _heard(data, layout, begin, stop, str(path), mix)
    overshoot = end is not None and stop > seconds + _OVERSHOOT_SECONDS
    if (begin and begin >= seconds) or overshoot:
        raise SAMLError(
            f"{path}: segment {begin:g} to {stop:g} s lies outside the recording, "
            f"which lasts {seconds:.2f} s"
        )
    if start is None and end is None:
        _warn_of_rest(path, layout, seconds)
    if mix.cancelled:
        warnings.warn(
            f"{path}: its channels cancel each other, so that little is left to hear; invert one "
            "of two, or give a single channel", SAMLWarning, stacklevel=2,
        )  # fmt: skip
    return _resampled(blocks, str(path))


def samples_of(audio: Audio, rate: int = SAMPLE_RATE) -> Path | npt.NDArray[np.float32]:
    """Samples as mono speech at 16 kHz: float32 [samples]; a file stays a path, to be read later.

    Args:
        audio: a file; or floating-point samples [samples], nominally within -1..1, as an array, a
            tensor or a list.
        rate: samples a second of what is no file.

    Raises:
        SAMLError: not one channel of finite floating-point samples, no samples, or a bad rate.
    """
    if isinstance(audio, str | os.PathLike):
        return Path(audio)
    detach: Any = getattr(audio, "detach", None)  # a tensor, on whatever device
    array: Any = np.asarray(audio if detach is None else detach().cpu().float().numpy())
    if isinstance(audio, list | tuple):
        array = array.astype(np.float32)
    check_audio(array, "audio")
    if rate < _LOWEST_RATE:
        raise SAMLError(f"rate: {rate}; expected samples a second, as in 16000")
    if rate != SAMPLE_RATE:
        array = soxr.resample(array, rate, SAMPLE_RATE)
    return array.astype(np.float32, copy=False)


def at_speed(clip: npt.NDArray[np.float32], speed: float) -> npt.NDArray[np.float32]:
    """A clip [samples] played `speed` times as fast: float32 [samples / speed]."""
    if speed == 1.0:
        return clip
    return soxr.resample(clip, SAMPLE_RATE, round(SAMPLE_RATE / speed)).astype(np.float32)


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
    _check_finite([array], name)


def _check_finite(parts: Sequence[npt.NDArray[np.floating]], name: str) -> None:
    count, first, seen = 0, 0, 0
    for part in parts:
        finite = np.isfinite(part)
        if not finite.all():
            first = first if count else seen + int(np.argmin(finite))
            count += int(part.size - np.count_nonzero(finite))
        seen += part.size
    if count:
        raise SAMLError(
            f"{name}: {count} samples are NaN or infinite, the first is number {first}; "
            "expected finite samples: export the recording again"
        )


class _Forward(soundfile.SoundFile):
    """Read straight on: soundfile seeks after every read, and decoders lose their place by it."""

    def seekable(self) -> bool:
        """Not to soundfile's own methods; `seek` works."""
        return False


def _heard(
    data: mmap.mmap, layout: Layout, begin: float, stop: float, name: str, mix: Downmix
) -> tuple[list[Block], float]:
    """What lies between two times, and how long the recording lasts (as far as `stop` at least).

    What turns out to be missing, or is left, is added to the layout.
    """
    blocks: list[Block] = []
    clock, beyond, reasons = 0.0, 0.0, []
    for stretch in layout.stretches:
        if clock >= stop:
            break
        times = begin - clock, stop - clock
        try:
            found, lasts, missing = _by_libsndfile(View(data, stretch), *times, name, mix)
            reason = "damaged from the beginning"
        except soundfile.SoundFileError as error:
            found, lasts, missing = [], 0.0, float("inf")
            reason = str(getattr(error, "error_string", error)).rstrip(".")
        if missing > _TOLERANCE_SECONDS and has_pyav():
            try:
                media = Media(View(data, stretch), mix)
                other, longer, less = _by_pyav(media, *times)
            except SAMLError as error:
                reason = str(error) if not found else reason
            else:
                if longer > lasts:
                    if missing < float("inf"):
                        less = max(less, lasts + missing - longer)
                    found, lasts, missing = other, longer, less
                    if media.tracks > 1:
                        layout.notes.append(
                            f"it holds {media.tracks} audio tracks, of which the first is heard"
                        )
        if missing and not lasts:
            reasons.append(reason)
            if len(layout.stretches) > 1:
                size = stretch.end - stretch.start
                layout.notes.append(f"{size:,} bytes from {stretch.start:,} on are no audio")
        else:
            layout.missing += missing + _seconds_of(stretch.missing, stretch, lasts)
            beyond += _seconds_of(stretch.beyond, stretch, lasts)
        blocks += found
        clock += lasts
    if reasons and not clock:
        hint = "" if has_pyav() else f"; M4A, MP4, WebM and others need PyAV: {install('audio')}"
        raise SAMLError(
            f"{name}: cannot be read as audio ({reasons[0]}); expected WAV, FLAC, MP3, Ogg or "
            f"SPHERE{hint}"
        )
    if beyond > _TOLERANCE_SECONDS:
        layout.notes.append(
            f"about {beyond:.1f} s follow after the length in its header and were not read: "
            "if they are speech, repair the header"
        )
    return blocks, clock


def _seconds_of(size: int, stretch: Stretch, seconds: float) -> float:
    """How long some bytes last, where the stretch's own samples last so many seconds."""
    return size * seconds / max(1, stretch.end - stretch.samples)


def _by_libsndfile(
    view: View, begin: float, stop: float, name: str, mix: Downmix
) -> tuple[list[Block], float, float]:
    """Blocks between two times, seconds that the stretch lasts, and seconds it promises beyond."""
    try:
        file = _Forward(view)
    except TypeError as error:  # it asks for the format of a headerless .raw file
        raise soundfile.SoundFileRuntimeError(str(error)) from error
    with file:
        rate = file.samplerate
        if rate < _LOWEST_RATE:
            raise SAMLError(f"{name}: {rate} samples a second; speech needs {_LOWEST_RATE}")
        frames = file.frames
        known = frames < 1 << 62  # not where a stream's header leaves the length open
        first = min(round(max(0.0, begin) * rate), frames)
        last = frames if stop * rate >= frames else round(stop * rate)
        if first == frames:
            return [], frames / rate, 0.0
        # A frame of MP3 borrows bits from those before it: it decodes wrongly after a seek.
        mpeg = file.subtype.startswith("MPEG")
        at = first if known and not mpeg else 0
        blocks: list[Block] = []
        try:
            if not mpeg:
                file.seek(at)  # to 0 too: libsndfile leaves Opus' padding in without
            while at < last:
                block = file.read(min(last - at, _BLOCK), dtype="float32", always_2d=True)
                if not len(block):
                    break
                used = block[max(0, first - at) :]
                at += len(block)
                if len(used):
                    blocks.append((rate, mix(used)))
        except soundfile.SoundFileError:
            pass  # damaged from here on: what follows is counted as missing
    if at >= last:
        return blocks, frames / rate, 0.0
    return blocks, at / rate, (frames - at) / rate if known else 0.0


def _by_pyav(media: Media, begin: float, stop: float) -> tuple[list[Block], float, float]:
    """As `_by_libsndfile`; the stretch is decoded to its end."""
    blocks: list[Block] = []
    clock = 0.0
    for rate, samples in media:
        first, last = (
            round(min(max(0.0, edge - clock), len(samples) / rate) * rate) for edge in (begin, stop)
        )
        if last > first:
            blocks.append((rate, samples[first:last]))
        clock += len(samples) / rate
    missing = media.lost if media.claim is None else max(media.lost, media.claim - clock)
    return blocks, clock, max(0.0, missing)


def _warn_of_rest(path: Path, layout: Layout, seconds: float) -> None:
    """One line on what of the file was not heard."""
    notes = list(layout.notes)
    if layout.missing > _TOLERANCE_SECONDS:
        notes.insert(0, f"{layout.missing:.1f} s more that it should hold are cut off or damaged")
    if notes:  # from one place, whoever reads: the same is said once
        warnings.warn(
            f"{path}: {seconds:.1f} s were read; {'; '.join(notes)}", SAMLWarning, stacklevel=1
        )


def _resampled(blocks: list[Block], name: str) -> npt.NDArray[np.float32]:
    """All blocks at 16 kHz, which empties the list; each rate by itself."""
    _check_finite([samples for _, samples in blocks], name)
    resampled: list[npt.NDArray[np.float32]] = []
    blocks.reverse()
    for rate, same in groupby(_emptied(blocks), key=lambda block: block[0]):
        if rate == SAMPLE_RATE:
            resampled += [samples for _, samples in same]
            continue
        stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
        resampled += [stream.resample_chunk(samples) for _, samples in same]
        resampled.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    samples = np.concatenate(resampled) if resampled else np.zeros(0, np.float32)
    check_audio(samples, name)
    return samples


def _emptied(blocks: list[Block]) -> Iterator[Block]:
    while blocks:
        yield blocks.pop()
