"""Transcripts as files, in the formats and with the names that openai-whisper uses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from saml_kernels.errors import SAMLError
from saml_kernels.files import atomic_path
from saml_models.text.transcript import Transcript

__all__ = ["FORMATS", "render", "write_transcript"]


def _txt(transcript: Transcript) -> str:
    return "".join(f"{segment.text}\n" for segment in transcript.segments)


def _json(transcript: Transcript) -> str:
    return json.dumps(transcript.to_dict(), ensure_ascii=False) + "\n"


def _srt(transcript: Transcript) -> str:
    return "".join(
        f"{number}\n{_clock(s.start, ',', hours=True)} --> {_clock(s.end, ',', hours=True)}\n"
        f"{_cue(s.text)}\n\n"
        for number, s in enumerate(transcript.segments, start=1)
    )


def _vtt(transcript: Transcript) -> str:
    cues = (
        f"{_clock(s.start, '.')} --> {_clock(s.end, '.')}\n{_cue(s.text)}\n\n"
        for s in transcript.segments
    )
    return "WEBVTT\n\n" + "".join(cues)


def _tsv(transcript: Transcript) -> str:
    rows = (
        f"{round(1000 * s.start)}\t{round(1000 * s.end)}\t{s.text.replace(chr(9), ' ')}\n"
        for s in transcript.segments
    )
    return "start\tend\ttext\n" + "".join(rows)


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "txt": _txt,
    "json": _json,
    "srt": _srt,
    "vtt": _vtt,
    "tsv": _tsv,
}


def render(transcript: Transcript, format: str) -> str:
    """The text of a file in one of `FORMATS`; times are milliseconds in srt, vtt and tsv.

    Raises:
        SAMLError: the format is unknown.
    """
    if format not in FORMATS:
        raise SAMLError(f"output format: {format!r}; expected one of {', '.join(FORMATS)}, all")
    return FORMATS[format](transcript)


def write_transcript(
    transcript: Transcript, folder: str | os.PathLike[str], stem: str, format: str = "all"
) -> list[Path]:
    """Write `<folder>/<stem>.<format>`, UTF-8; "all" writes every format, or none on failure.

    Raises:
        SAMLError: the format is unknown, or a file cannot be written.
    """
    wanted = list(FORMATS) if format == "all" else [format]
    texts = {Path(folder) / f"{stem}.{kind}": render(transcript, kind) for kind in wanted}
    with ExitStack() as stack:  # files appear together, when all of them are on the disk
        for path, text in texts.items():
            temporary = stack.enter_context(atomic_path(path))
            with open(temporary, "w", encoding="utf-8", newline="\n") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
    return list(texts)


def _clock(seconds: float, decimal: str, hours: bool = False) -> str:
    """[hh:]mm:ss.mmm; the hours are left out where they are zero and not asked for."""
    left = round(1000 * max(0.0, seconds))
    left, milliseconds = divmod(left, 1000)
    left, second = divmod(left, 60)
    hour, minute = divmod(left, 60)
    front = f"{hour:02d}:" if hours or hour else ""
    return f"{front}{minute:02d}:{second:02d}{decimal}{milliseconds:03d}"


def _cue(text: str) -> str:
    """An arrow would be read as a line of times."""
    return text.replace("-->", "->")
