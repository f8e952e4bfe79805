"""The command `saml grow-conformer`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from saml_models.cli.options import (
    Device,
    Epochs,
    LearningRate,
    Model,
    Seed,
    checkpoint_of,
    device_named,
    given,
)
from saml_models.cli.output import progress, resumable
from saml_models.runtime.quiet import quiet_libraries


def grow_conformer(
    data: Annotated[
        list[Path], typer.Option(help="Speech of many speakers with its text; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the model, at full precision.")],
    model: Model = "tiny.en",
    exclude_speakers: Annotated[
        str, typer.Option(help="Comma-separated: kept for adaptation and tests.")
    ] = "",
    control: Annotated[
        bool,
        typer.Option("--control", help="Train the Whisper's own encoder instead, for comparison."),
    ] = False,
    kernel: Annotated[
        int | None, typer.Option(min=1, help="Frames of the depthwise convolution; default 31.")
    ] = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    encoder_epochs: Annotated[
        int | None, typer.Option(min=0, help="Of the whole encoder, after the new branches.")
    ] = None,
    encoder_rate: Annotated[
        float | None, typer.Option(min=1e-9, help="AdamW's peak for the whole encoder.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Grow a Conformer from a Whisper: train new branches of its encoder, then all of that.

    A training that was killed goes on when the command is started again.
    """
    quiet_libraries()
    from saml_kernels.files import atomic_folder, check_new_folder
    from saml_models.compress.loading import load_model
    from saml_models.data.corpora import load_corpora
    from saml_models.training.grow import BRANCHES, ENCODER, Growth
    from saml_models.training.grow import grow_conformer as grow

    check_new_folder(out)
    kept_out = {name.strip() for name in exclude_speakers.split(",") if name.strip()}
    utterances = load_corpora(data, kept_out)
    growth = Growth(
        replace(BRANCHES, **given(epochs, learning_rate, seed)),
        replace(ENCODER, **given(encoder_epochs, encoder_rate, None if seed is None else seed + 1)),
        {} if kernel is None else {"conv_kernel_size": kernel},
    )
    network, processor = load_model(model, device_named(device))
    checkpoint = checkpoint_of(out)
    with resumable(checkpoint), progress("growing") as show:
        grown, reports = grow(
            network,
            processor,
            utterances,
            growth,
            control=control,
            checkpoint=checkpoint,
            on_step=lambda done, steps, loss: show(done, steps, f"loss {loss:.3f}"),
            on_heard=lambda done, clips: show(done, clips, "finding the texts' style"),
            on_taught=lambda done, clips: show(done, clips, "asking the Whisper"),
        )
        with atomic_folder(out) as temporary:
            grown.save_pretrained(temporary)
            processor.save_pretrained(temporary)
    for report in reports:
        typer.echo(f"{report.steps} steps: loss {report.first_loss:.3f} to {report.last_loss:.3f}")
    before, after = (sum(p.numel() for p in one.parameters()) for one in (network, grown))
    typer.echo(f"written: {out}, {after:,} parameters; {model} has {before:,}")
    typer.echo(f"use it: saml evaluate --model {out} ...")
