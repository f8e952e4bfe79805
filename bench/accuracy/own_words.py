"""Errors on own words and on all others, with a list of them or not.

    python -m bench own-words --data LibriSpeech/test-other --known TRAINING --others 100,1000

Own are the words of the heard clips that no text of `--known` holds, of four letters at least, in
one list for all clips; to it come so many other words of `--known` that nobody says. Clips are
decoded together, greedily; a word is wrong where its alignment says so, and what is inserted
counts among the others.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jiwer
import typer
from rich.console import Console
from rich.table import Table

from bench.models.clips import at_once, spread
from saml_kernels.errors import SAMLError
from saml_models.data.corpora import load_corpus
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries
from saml_models.speakers.pretrained import load_adaptable
from saml_models.text.normalise import normalise
from saml_models.transcription.clips import decode_clips

SHORTEST = 4  # letters


def wrong(said: Sequence[str], heard: Sequence[str], own: set[str]) -> tuple[int, int, int, int]:
    """Errors on own words and their number, errors on others and their number; texts normalised."""
    counts = [0, 0, 0, 0]
    for reference, hypothesis in zip(said, heard, strict=True):
        words = reference.split()
        found = jiwer.process_words(reference, hypothesis)
        missed = {
            i
            for part in found.alignments[0]
            if part.type in ("substitute", "delete")
            for i in range(part.ref_start_idx, part.ref_end_idx)
        }
        for i, word in enumerate(words):
            place = 0 if word in own else 2
            counts[place] += i in missed
            counts[place + 1] += 1
        counts[2] += found.insertions
    return counts[0], counts[1], counts[2], counts[3]


def main(
    data: Annotated[Path, typer.Option(help="A corpus of English.")],
    known: Annotated[list[Path], typer.Option(help="Corpora, or manifests, of other texts.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    clips: Annotated[int, typer.Option()] = 60,
    bonus: Annotated[str, typer.Option(help="Nats a token, by commas.")] = "1,2,3",
    others: Annotated[str, typer.Option(help="Words that nobody says, by commas.")] = "100",
) -> None:
    quiet_libraries()
    others_say = [normalise(u.text) for path in known for u in load_corpus(path, need_audio=False)]
    texts = Counter(word for text in others_say for word in text.split())
    utterances = spread(at_once(load_corpus(data)), clips)
    said = [normalise(u.text) for u in utterances]
    audio = [u.load() for u in utterances]
    own = sorted({w for t in said for w in t.split() if w not in texts and len(w) >= SHORTEST})
    if not own:
        raise SAMLError("--known: holds every word that is said; give other texts")
    rest = sorted(w for w, count in texts.items() if count == 1 and len(w) >= SHORTEST)
    random.Random(0).shuffle(rest)
    spoken = {w for t in said for w in t.split()}
    rest = [w for w in rest if w not in spoken]
    speech = bind(*load_adaptable(model))
    title = f"{model}, {len(audio)} clips, {len(own)} words in none of {len(others_say)} texts"
    table = Table(title=title)
    for head in ("list", "bonus", "WER %", "own words wrong", "errors on others", "seconds"):
        table.add_column(head, justify="right")
    tries = [(int(n), float(b)) for n in others.split(",") for b in bonus.split(",")]
    for more, nats in [(None, 0.0), *tries]:
        words = None if more is None else speech.own_words([*own, *rest[:more]], nats)
        started = time.perf_counter()
        heard = [normalise(text) for text in decode_clips(speech, audio, own_words=words)]
        seconds = time.perf_counter() - started
        missed, owned, errors, count = wrong(said, heard, set(own))
        table.add_row(
            "-" if more is None else str(len(own) + more), "-" if more is None else f"{nats:g}",
            f"{100 * (missed + errors) / (owned + count):.2f}", f"{missed} of {owned}",
            f"{errors} of {count}", f"{seconds:.1f}",
        )  # fmt: skip
    Console().print(table)
