"""WER and time of a quantised Whisper by length of window.

    python -m bench windows --data LibriSpeech/test-other --margins 1,10,30

A clip is heard with so many seconds of silence after it, in 30 s at most; the default is
`models.interface.QUANTISED_MARGIN`. Clips are decoded together, greedily; times are of one run.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.models.clips import spread
from saml_kernels import SAMLConfig
from saml_models.data.corpora import load_corpus
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries
from saml_models.speakers.pretrained import load_adaptable
from saml_models.text.wer import pooled, word_errors
from saml_models.transcription.clips import decode_clips


def main(
    data: Annotated[Path, typer.Option(help="A corpus of English.")],
    model: Annotated[str, typer.Option()] = "base",
    clips: Annotated[int, typer.Option()] = 30,
    margins: Annotated[str, typer.Option(help="Seconds, by commas.")] = "1,10,30",
) -> None:
    quiet_libraries()
    network, processor = load_adaptable(model, SAMLConfig(num_experts=0))
    utterances = spread(load_corpus(data), clips)
    audio, said = [u.load() for u in utterances], [u.text for u in utterances]
    table = Table(title=f"{model}, quantised, {len(audio)} clips")
    for name in ("margin s", "WER %", "seconds"):
        table.add_column(name, justify="right")
    for margin in map(float, margins.split(",")):
        network.saml.margin = margin
        started = time.monotonic()
        heard = decode_clips(bind(network, processor), audio, language="en")
        seconds = time.monotonic() - started
        wer = float(pooled(word_errors(said, heard)).wer)
        table.add_row(f"{margin:g}", f"{wer:.2f}", f"{seconds:.1f}")
    Console().print(table)
