"""What was said, when: the parts of a transcript."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Segment", "Transcript", "Word"]


@dataclass(frozen=True)
class Word:
    """A word, with the space before it, and its times in seconds."""

    start: float
    end: float
    word: str


@dataclass(frozen=True)
class Segment:
    """A stretch of speech, in seconds from the beginning of the recording."""

    id: int
    start: float
    end: float
    text: str
    words: list[Word] | None = None


@dataclass(frozen=True)
class Transcript:
    """What was said. `speaker_hash` is the SHA-256 of the profile that heard it, or None."""

    text: str
    language: str
    duration: float
    segments: list[Segment]
    speaker_hash: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `words` only where there are some."""
        values = asdict(self)
        for segment in values["segments"]:
            if segment["words"] is None:
                del segment["words"]
        return values
