"""P7: transcription beside peers: time, memory, WER.

    python -m bench transcription --data LibriSpeech/test-other

The same real speech for all. Everybody (recognisers.py) decodes greedily, unless its name says
otherwise, in float32 on a CPU and float16 on a GPU, hears each clip by itself, without times, and
says how long the transcription alone took: the model is loaded and warm. On a CPU the peak is that
of the process, imports included.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from bench.models.clips import at_once, spread
from bench.models.recognisers import RECOGNISERS
from bench.models.turns import answer, in_turn, record, stopwatch
from bench.place import RESULTS
from saml_models.cli.options import Experts
from saml_models.compress.checkpoint import save_saml
from saml_models.data.corpora import load_corpus
from saml_models.speakers.pretrained import load_adaptable
from saml_models.text.wer import pooled, word_errors


def work(name: str, model: str, device: torch.device, threads: int, clips: Path) -> None:
    """Load, warm up on two clips, time all of them."""
    with np.load(clips) as stored:
        audio = [stored[str(i)] for i in range(len(stored))]
    run = RECOGNISERS[name](model, device, threads, clips.with_name("quantised"))
    run(audio[:2])
    seconds, texts = stopwatch(lambda: run(audio), device)
    answer(device, seconds, texts=texts)


def quantise(model: str, experts: Path | None, folder: Path) -> None:
    """What an edge device is given: the quantised model with its experts, in one folder."""
    network, processor = load_adaptable(model, experts=experts)
    save_saml(network, processor, folder)


def main(
    data: Annotated[Path | None, typer.Option(help="A corpus; not needed by a worker.")] = None,
    model: Annotated[str, typer.Option()] = "tiny.en",
    clips: Annotated[int, typer.Option()] = 30,
    rounds: Annotated[int, typer.Option()] = 3,
    threads: Annotated[int, typer.Option()] = 2,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    only: Annotated[str | None, typer.Option(help="Names in RECOGNISERS, by semicolons.")] = None,
    experts: Experts = None,
    results: Annotated[Path, typer.Option(help="Folder.")] = RESULTS,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    audio: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    where = torch.device(device)
    torch.set_num_threads(threads)
    if worker and audio:
        work(worker, model, where, threads, audio)
        return
    if data is None:
        raise typer.BadParameter("needs --data")
    utterances = spread(at_once(load_corpus(data)), clips)
    seconds = sum(len(u.load()) for u in utterances) / 16000
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "clips.npz"
        np.savez(stored, **{str(i): u.load() for i, u in enumerate(utterances)})  # type: ignore
        quantise(model, experts, stored.with_name("quantised"))
        options = ["--model", model, "--audio", stored, "--threads", threads, "--device", device]
        names = only.split(";") if only else list(RECOGNISERS)
        rows, skipped = in_turn("bench.models.transcription", names, options, rounds)
    for row in rows:
        texts = row.pop("texts")
        row["real_time_factor"] = round(row["seconds"] / seconds, 5)
        row["wer"] = round(float(pooled(word_errors([u.text for u in utterances], texts)).wer), 2)
    named = f"{model}, experts {experts.stem}" if experts else model
    title = f"transcription, Whisper {named}, {len(utterances)} clips, {seconds:.0f} s of speech"
    record(f"P7 {named}", title, (rows, skipped), results, where, threads)


if __name__ == "__main__":
    typer.run(main)
