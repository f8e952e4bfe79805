"""The command `saml pretrain`."""

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
    Overwrite,
    Seed,
    checkpoint_of,
    device_named,
    given,
)
from saml_models.cli.output import print_result, progress, resumable
from saml_models.runtime.quiet import quiet_libraries


def pretrain(
    data: Annotated[
        list[Path], typer.Option(help="Speech of many speakers with its text; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="The experts to write (safetensors).")],
    model: Model = "tiny.en",
    exclude_speakers: Annotated[
        str, typer.Option(help="Comma-separated: kept for adaptation and tests.")
    ] = "",
    num_experts: Annotated[
        int | None, typer.Option(min=1, help="1 is a single LoRA; default 4.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of one expert; default 4.")] = None,
    per_speaker: Annotated[
        int | None, typer.Option(min=1, help="Utterances of one speaker at most; default 200.")
    ] = None,
    teacher: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the full-precision model's own answers in what is learnt, where they "
            "are right; default 0.5.",
        ),
    ] = None,
    encoder_share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Of what the encoder's experts learn, that is kept: more for voices like those of "
            "the data, less for others; default 0.5 where they start as a LoRA does, else 1.",
        ),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Trainings from one start, with seeds of their own, whose experts are averaged: "
            "each takes as long; default 1.",
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With a folder of `saml quantize` as --model: what it was made of, to teach.",
        ),
    ] = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Train experts and routers on many speakers: what adaptation starts from.

    They are fresh ones; those of a folder that `saml quantize` wrote go on from where they are.
    """
    quiet_libraries()
    from saml_kernels import SAMLConfig
    from saml_kernels.errors import SAMLError
    from saml_kernels.files import check_output
    from saml_models.compress.loading import load_model
    from saml_models.compress.shipped_rounding import compress
    from saml_models.data.corpora import load_corpora
    from saml_models.speakers.profile import is_profile
    from saml_models.training.calibration import starts_from_error
    from saml_models.training.pretrain import PRETRAINING
    from saml_models.training.pretrain import pretrain as learn
    from saml_models.training.samples import PER_SPEAKER

    check_output(out, is_profile, overwrite)
    kept_out = {name.strip() for name in exclude_speakers.split(",") if name.strip()}
    utterances = load_corpora(data, kept_out)
    options = replace(PRETRAINING, **given(epochs, learning_rate, seed))
    if teacher is not None:
        options = replace(options, teacher=teacher)
    network, processor = load_model(model, device_named(device))
    if not hasattr(network, "saml"):
        if original is not None:
            raise SAMLError(f"--original: {model} is at full precision itself; leave it out")
        typer.echo(compress(network, SAMLConfig(num_experts=num_experts or 4, rank=rank or 4)))
        original = model
    elif num_experts or rank:
        raise SAMLError(f"--num-experts, --rank: {model} has experts; leave these out")
    elif original is None:
        if teacher:
            raise SAMLError(f"--teacher: {model} is quantised; name what it was with --original")
        options = replace(options, teacher=0.0)
    full = None
    if original is not None and (options.teacher or starts_from_error(network)):
        full, _ = load_model(original, device_named(device))
        if hasattr(full, "saml") or full.config.vocab_size != network.config.vocab_size:
            raise SAMLError(f"--original: {original}: expected {model} at full precision")
    checkpoint = checkpoint_of(out)
    with resumable(checkpoint), progress("pretraining") as show:
        profile = learn(
            network,
            processor,
            utterances,
            options,
            per_speaker=per_speaker or PER_SPEAKER,
            encoder_share=encoder_share,
            runs=runs or 1,
            checkpoint=checkpoint,
            on_step=lambda done, steps, loss: show(done, steps, f"loss {loss:.3f}"),
            on_heard=lambda done, clips: show(done, clips, "finding the texts' style"),
            on_taught=lambda done, clips: show(done, clips, "asking the full-precision model"),
            original=full,
        )
        profile.save(out)
    about = profile.about
    typer.echo(
        f"learnt from {about['speakers']} speakers, {about['utterances']} utterances "
        f"({about['seconds'] / 3600:.2f} h of speech)"
    )
    print_result(network, profile, out)
    typer.echo(f"use it: saml adapt --model {model} --experts {out} ...")
