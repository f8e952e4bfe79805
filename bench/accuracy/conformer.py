"""A grown Conformer beside the same without its new branches: WER.

    saml grow-conformer --data voices.jsonl --out grown
    saml grow-conformer --data voices.jsonl --out control --control
    python -m bench conformer --grown grown --control control --data DATA --json FILE

Full precision, greedy decoding, every utterance of the sets (`VOICES`); nobody is adapted to.
Errors are written after each set, and what is in the file is not heard again. The ratio is of the
grown model's errors to a system's, with a 95 % interval over speakers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.accuracy import listening
from bench.accuracy.over_speakers import table
from bench.accuracy.speech import VOICES
from saml_kernels.errors import SAMLError
from saml_models.compress.loading import load_model
from saml_models.models.interface import SpeechModel
from saml_models.models.registry import bind
from saml_models.models.whisper.conformer import ConformerWhisper, without_branches
from saml_models.runtime.quiet import quiet_libraries

__all__ = ["HEADS", "rows"]

GROWN, BARE, WHISPER = "Conformer", "Conformer, new branches zero", "Whisper"
CONTROL = "Whisper, encoder trained as long"
HEADS = ("voices", "system", "WER %", "Conformer to it (95 %)")


def systems(grown: str, whisper: str, control: str | None) -> dict[str, Callable[[], SpeechModel]]:
    """How each is made."""

    def conformer() -> tuple[ConformerWhisper, Any]:
        network, processor = load_model(grown)
        if not isinstance(network, ConformerWhisper):
            raise SAMLError(f"{grown}: expected a Conformer that grew from a Whisper")
        return network, processor

    def bare() -> SpeechModel:
        network, processor = conformer()
        return bind(without_branches(network), processor)

    made: dict[str, Callable[[], SpeechModel]] = {
        GROWN: lambda: bind(*conformer()),
        BARE: bare,
        WHISPER: lambda: bind(*load_model(whisper)),
    }
    if control is not None:
        made[CONTROL] = lambda: bind(*load_model(control))
    return made


def rows(results: dict[str, Any]) -> list[list[str]]:
    """A row for each set and system."""
    return listening.rows(results, of=(GROWN,))


def main(
    grown: Annotated[str, typer.Option(help="A Conformer: folder, file or name.")],
    data: Annotated[Path, typer.Option(help="Holds LibriSpeech/, speechocean762/ and so on.")],
    json_file: Annotated[Path, typer.Option("--json", help="Results, added to.")],
    whisper: Annotated[str, typer.Option(help="That it grew from.")] = "tiny.en",
    control: Annotated[str | None, typer.Option(help="From grow-conformer --control.")] = None,
    sets: Annotated[str, typer.Option(help="Of VOICES, by commas.")] = ",".join(VOICES),
) -> None:
    quiet_libraries()
    made = systems(grown, whisper, control)
    results = listening.listen(made, sets, data, json_file, f"a Conformer from {whisper}")
    Console().print(table("word error rate", HEADS, rows(results)))
