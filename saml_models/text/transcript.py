"""What was said, when: the parts of a transcript."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Decoding", "Segment", "Transcript", "Word"]


@dataclass(frozen=True)
class Word:
    """A word, with the space before it, and its times in seconds."""

    start: float
    end: float
    word: str


@dataclass(frozen=True)
class Decoding:
    """How a segment was decoded, under openai-whisper's names; all but `tokens` are its window's.

    Attributes:
        seek: hundredths of a second at which the window begins.
        tokens: of the segment, timestamps among them.
        temperature: at which they were drawn; 0 is the likeliest.
        avg_logprob: mean log-probability of the window's tokens and of its end.
        compression_ratio: bytes of the window's text, UTF-8, over those of it by zlib.
        no_speech_prob: probability that there is no speech in the window.
    """

    seek: int
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech, in seconds from the beginning of the recording.

    `decoding` is None where the model does not tell; segments that say the same at the same time
    are equal, however they were decoded.
    """

    id: int
    start: float
    end: float
    text: str
    words: list[Word] | None = None
    decoding: Decoding | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, those of `decoding` beside the others; `words` where there are."""
        values = asdict(self)
        values |= values.pop("decoding") or {}
        if self.words is None:
            del values["words"]
        return values


@dataclass(frozen=True)
class Transcript:
    """What was said. `speaker_hash` is the SHA-256 of the profile that heard it, or None."""

    text: str
    language: str
    duration: float
    segments: list[Segment]
    speaker_hash: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the segments as `Segment.to_dict` has them."""
        return asdict(self) | {"segments": [segment.to_dict() for segment in self.segments]}
