"""Experts alone on all sets of voices, beside the models without them.

    python -m bench experts --data DATA --json bench/results/experts-tiny.en.json
    python -m bench experts ... --experts mine=experts.safetensors --sets readers,noisy
    python -m bench experts ... --experts mine=experts.safetensors --only "quantised,mine"

Systems: the model at full precision, quantised, with the experts that ship, and with those of each
`--experts NAME=FILE`. Nobody is adapted to: every utterance of the sets (`VOICES`) is heard,
greedily. Errors are written after each set, and what is in the file is not done again. The
table gives pooled word error rates, ratios to full precision, to the quantised model and to the
experts that ship, with 95 % intervals over speakers (of one speaker over its clips), and for how
many speakers there are more errors than with the quantised model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.accuracy import listening
from bench.accuracy.over_speakers import table
from bench.accuracy.speech import VOICES
from bench.named import some_of
from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_models.compress.loading import load_model
from saml_models.compress.shipped_rounding import compress
from saml_models.models.interface import QUANTISED_MARGIN, SpeechModel
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries
from saml_models.speakers.pretrained import load_adaptable

FULL, QUANTISED, SHIPPED = "full precision", "quantised", "shipped experts"
HEADS = (
    "voices", "system", "WER %", "to full precision", "to quantised", "to those that ship",
    "made worse",
)  # fmt: skip


def systems(model: str, files: dict[str, Path]) -> dict[str, Callable[[], SpeechModel]]:
    """How each is made; `files` of experts by the systems' names."""

    def quantised() -> SpeechModel:
        network, processor = load_model(model)
        compress(network, SAMLConfig(num_experts=0))
        network.saml.margin = QUANTISED_MARGIN
        return bind(network, processor)

    return {
        FULL: lambda: bind(*load_model(model)),
        QUANTISED: quantised,
        SHIPPED: lambda: bind(*load_adaptable(model)),
        **{name: partial(_with_experts, model, file) for name, file in files.items()},
    }


def _with_experts(model: str, file: Path) -> SpeechModel:
    return bind(*load_adaptable(model, experts=file))


def rows(results: dict[str, Any]) -> list[list[str]]:
    """A row for each set and system."""
    return listening.rows(results, to=(FULL, QUANTISED, SHIPPED), worse_than=QUANTISED)


def main(
    data: Annotated[Path, typer.Option(help="Holds LibriSpeech/, speechocean762/ and so on.")],
    json_file: Annotated[Path, typer.Option("--json", help="Results, added to.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    experts: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE from `saml pretrain`; may be repeated.")
    ] = None,
    sets: Annotated[str, typer.Option(help="Of VOICES, by commas.")] = ",".join(VOICES),
    only: Annotated[str | None, typer.Option(help="Systems by commas; all unless given.")] = None,
) -> None:
    quiet_libraries()
    files = {}
    for one in experts or []:
        name, _, file = one.partition("=")
        if not Path(file).is_file():
            raise SAMLError(f"--experts {one}: expected NAME=FILE, the file from `saml pretrain`")
        files[name] = Path(file)
    plan = systems(model, files)
    chosen = some_of("--only", only, plan)
    results = listening.listen(plan, sets, data, json_file, model, chosen)
    title = f"{model}: ratios with 95 % intervals over speakers"
    Console().print(table(title, HEADS, rows(results)))
