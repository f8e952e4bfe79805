"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Device",
    "Epochs",
    "Experts",
    "Guarded",
    "LearningRate",
    "Model",
    "Overwrite",
    "Seed",
    "Store",
    "beside",
    "checkpoint_of",
    "device_named",
    "given",
]

Model = Annotated[
    str,
    typer.Option(
        help="openai-whisper's name (tiny.en, base, ...), a Hugging Face id, or a folder in "
        "Hugging Face, CTranslate2 or `saml quantize` layout."
    ),
]

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda if there is.")]

Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the utterances.")]

LearningRate = Annotated[float | None, typer.Option(min=1e-9, help="AdamW's peak.")]

Experts = Annotated[
    Path | None,
    typer.Option(help="Pretrained: a file, or `english` for base; default: those shipped."),
]

Guarded = Annotated[
    bool,
    typer.Option(
        "--guard/--no-guard",
        help="Use what was learnt only if it helps with clips that are held back.",
    ),
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]

Seed = Annotated[int | None, typer.Option(min=0, help="Of everything random.")]


Store = Annotated[
    Path | None,
    typer.Option(
        help="Folder of enrolled speakers; default: $SAML_SPEAKERS, or one among the user's data."
    ),
]


def device_named(name: str | None) -> str:
    """The device asked for, else a GPU where there is one."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def beside(out: Path, what: str) -> Path:
    """`out` with `.what` after its name, which a path such as "." does not say itself."""
    out = out.resolve()
    return out.with_name(f"{out.name}.{what}")


def checkpoint_of(out: Path) -> Path:
    """Where the training of `out` keeps its progress."""
    return beside(out, "checkpoint")


def given(epochs: int | None, learning_rate: float | None, seed: int | None) -> dict[str, Any]:
    """What was asked for, as fields of `TrainingOptions`."""
    options = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed}
    return {key: value for key, value in options.items() if value is not None}
