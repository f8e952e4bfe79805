"""The command `saml quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saml_models.cli.options import (
    Experts,
    Model,
)
from saml_models.runtime.quiet import quiet_libraries


def quantize(
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A new folder.")],
    model: Model = "tiny.en",
    experts: Experts = None,
) -> None:
    """Write a low-bit model with its experts as a folder that --model takes."""
    quiet_libraries()
    from saml_kernels.files import check_new_folder
    from saml_models.recogniser import Recogniser

    check_new_folder(out)
    recogniser = Recogniser.load(model, compress=False)
    report = recogniser.quantize(experts)
    stored = recogniser.save(out)
    typer.echo(report)
    typer.echo(
        f"{out}: {stored / 1e6:.2f} MB on disk with everything, {report.full_bytes / stored:.2f}x "
        f"smaller than {report.full_bytes / 1e6:.1f} MB in float32"
    )
