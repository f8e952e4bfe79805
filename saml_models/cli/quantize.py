"""The command `saml quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saml_models.cli.options import (
    Experts,
    Model,
    Seed,
    beside,
)
from saml_models.cli.output import Interrupted, progress
from saml_models.runtime.quiet import quiet_libraries


def quantize(
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A new folder.")],
    model: Model = "tiny.en",
    experts: Experts = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Choose a Whisper's rounding on this speech, at the same bytes: a corpus, "
            "manifest or folder of audio, with or without text. The experts are then new ones.",
        ),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(min=1, help="With --calibration: how many are heard; default 80.")
    ] = None,
    seed: Seed = None,
) -> None:
    """Write a low-bit model with its experts as a folder that --model takes.

    A calibration that was killed goes on when the command is started again.
    """
    quiet_libraries()
    from saml_kernels.errors import SAMLError
    from saml_kernels.files import check_new_folder
    from saml_models.compress.calibration_speech import CLIPS
    from saml_models.compress.calibration_stages import check_stages, remove_stages
    from saml_models.data.corpora import load_corpus
    from saml_models.recogniser import Recogniser

    check_new_folder(out)
    if calibration is None and (clips is not None or seed is not None):
        raise SAMLError("--clips, --seed: are of a calibration; give --calibration")
    speech = work = None
    if calibration is not None:
        work = beside(out, "calibration")
        check_stages(work)
        speech = load_corpus(calibration, need_text=False)
    recogniser = Recogniser.load(model, compress=False)
    with progress("calibrating") as show:
        try:
            report = recogniser.quantize(
                experts,
                calibration=speech,
                clips=clips or CLIPS,
                seed=seed or 0,
                work=work,
                on_progress=show,
            )
        except KeyboardInterrupt:
            if work is None or not work.is_dir():
                raise
            raise Interrupted(
                f"interrupted; {work} holds the finished layers: run the same command to go on"
            ) from None
    stored = recogniser.save(out)
    if work is not None:
        remove_stages(work)
    typer.echo(report)
    typer.echo(
        f"{out}: {stored / 1e6:.2f} MB on disk with everything, {report.full_bytes / stored:.2f}x "
        f"smaller than {report.full_bytes / 1e6:.1f} MB in float32"
    )
