"""The command `saml train-base`: a small Conformer from scratch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from saml_models.quiet import quiet_libraries
from saml_models.terminal import (
    Device,
    Epochs,
    LearningRate,
    Seed,
    checkpoint_of,
    device_named,
    given,
    progress,
    resumable,
)

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Register `train-base`."""
    app.command("train-base")(train_base)


def train_base(
    data: Annotated[
        list[Path], typer.Option(help="Speech of many speakers with its text; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the model.")],
    exclude_speakers: Annotated[
        str, typer.Option(help="Comma-separated: kept for adaptation and tests.")
    ] = "",
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Train a small Conformer on joint CTC and attention; a killed run resumes."""
    quiet_libraries()
    from saml_models.base_training import BASE
    from saml_models.base_training import train_base as learn
    from saml_models.corpora import load_corpus
    from saml_models.files import atomic_folder, check_new_folder

    check_new_folder(out)
    kept_out = {name.strip() for name in exclude_speakers.split(",")}
    found = [utterance for path in data for utterance in load_corpus(path)]
    utterances = [utterance for utterance in found if utterance.speaker not in kept_out]
    options = replace(BASE, **given(epochs, learning_rate, seed))
    checkpoint = checkpoint_of(out)
    with resumable(checkpoint), progress("training") as show:
        model, processor, report = learn(
            utterances,
            options,
            checkpoint=checkpoint,
            device=device_named(device),
            on_step=lambda done, steps, loss: show(done, steps, f"loss {loss:.3f}"),
        )
        with atomic_folder(out) as temporary:
            model.half().save_pretrained(temporary)  # what rounding costs is far below a word
            processor.save_pretrained(temporary)
    parameters = sum(p.numel() for p in model.parameters())
    typer.echo(f"{report.steps} steps, loss {report.first_loss:.3f} to {report.last_loss:.3f}")
    typer.echo(f"written: {out} ({parameters:,} parameters, in float16)")
    typer.echo(f"use it: saml evaluate --model {out} ...")
