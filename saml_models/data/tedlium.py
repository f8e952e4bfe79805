"""TED-LIUM 3 transcripts: STM lines to segments of talks.

Every line is `recording channel speaker start end <labels> words...`. The words are written in
tokens (`it 's`), with marks for noise and unknown words; see `clean_text` for what becomes of them.
Source: Hernandez et al., "TED-LIUM 3" (arXiv 1805.04699); the rules are those of the corpus's
Kaldi and ESPnet recipes, with marks removed rather than modelled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from saml_kernels.errors import SAMLError

__all__ = ["Segment", "clean_text", "parse_stm"]

_IGNORED = "ignore_time_segment_in_scoring"
_GAP = "inter_segment_gap"
# {NOISE}, [NOISE], <sil>, <o,f0,male>: everything bracketed except the unknown word.
_MARK = re.compile(r"\{[^}]*\}|\[[^\]]*\]|<(?!unk>)[^>]*>", re.IGNORECASE)
_UTTERANCE_NAME = re.compile(r"\([^\s()]*\)\s*$")
_VARIANT = re.compile(r"\(\d+\)")


class Segment(NamedTuple):
    """One utterance of a talk; times in seconds from the recording's beginning."""

    id: str
    recording: str
    speaker: str
    start: float
    end: float
    text: str


def clean_text(words: str) -> str:
    """Turn the words of an STM line into plain text.

    Removed: labels and marks (`<o,f0,male>`, `{NOISE}`, `<sil>`), numbers of pronunciation
    variants (`read(2)`), the utterance's name at the end of a line (`(talk-12.3-15)`), and unknown
    words (`<unk>`, with an apostrophe suffix if one follows). Words that begin with an apostrophe
    join the word before them: `it 's` becomes `it's`.
    """
    words = _VARIANT.sub("", words)
    words = _MARK.sub(" ", _UTTERANCE_NAME.sub("", words))
    joined: list[str] = []
    for token in words.split():
        if token.startswith("'") and joined:
            joined[-1] += token
        else:
            joined.append(token)
    # After the joins, so that "the <unk> 's" does not become "the's".
    return " ".join(token for token in joined if "<unk>" not in token.lower())


def parse_stm(lines: Iterable[str], name: str) -> Iterator[Segment]:
    """Yield the segments of one STM file that hold speech of a known speaker, in file order.

    Comments (`;;`), gaps between segments, segments ignored in scoring, segments without a word
    left by `clean_text` and segments that end where they start are skipped.

    Args:
        lines: the file's lines.
        name: the file's name for error messages.

    Raises:
        SAMLError: a line that is no STM line, with the file's name and the line's number.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(";;"):
            continue
        fields = line.split(maxsplit=5)
        if len(fields) < 5:
            raise SAMLError(
                f"{name}:{number}: {len(fields)} fields; "
                "expected `recording channel speaker start end <labels> words`"
            )
        recording, _, speaker, start_text, end_text, *rest = fields
        words = rest[0] if rest else ""
        if speaker == _GAP or _IGNORED in words:
            continue
        try:
            start, end = float(start_text), float(end_text)
        except ValueError:
            start = end = math.nan
        if not (0 <= start < math.inf and 0 <= end < math.inf):
            raise SAMLError(
                f"{name}:{number}: times {start_text} and {end_text}; expected seconds, 0 or more"
            )
        if "/" in recording or "\\" in recording or recording.startswith("."):
            raise SAMLError(f"{name}:{number}: recording {recording!r}; expected a plain file name")
        text = clean_text(words)
        if text and end > start:
            segment_id = f"{recording}-{round(start * 100):07d}-{round(end * 100):07d}"
            yield Segment(segment_id, recording, speaker, start, end, text)
