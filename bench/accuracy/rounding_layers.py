"""KL as one part of a Whisper after the other is rounded.

    python -m bench rounding-layers --data DATA --json bench/results/kl-by-part-tiny.en.json \
        --figure docs/images/rounding-layers.png

Parts are rounded in the order in which sound passes them, the embedding, which is the output head
too, last: plainly, and with the calibrated rounding that ships. After each the mean over text
tokens of KL(full precision || rounded so far) is taken, the decoder given the text in the model's
own style, over the English sets of `rounding`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.accuracy.rounding import ENGLISH, PLAIN
from bench.models.clips import spread
from bench.report.environment import about
from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.files import check_output, is_json, write_figure, write_json
from saml_models.cli.output import progress
from saml_models.compress.apply import apply_saml
from saml_models.compress.layers import compression_of
from saml_models.compress.loading import load_model
from saml_models.compress.shipped_rounding import compress
from saml_models.evaluation.divergence import Divergence
from saml_models.evaluation.figures import new_figure
from saml_models.models.interface import Clip
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries
from saml_models.text.style import in_model_style
from saml_models.transcription.clips import decode_clips

SHIPPED = "calibrated"
EMBEDDING = ("model.decoder.embed_tokens", "model.decoder.embed_positions", "proj_out")


def parts(whisper: Any) -> dict[str, tuple[str, ...]]:
    """The modules of each part by its title, in order."""
    found = {name: (f"model.encoder.{name}",) for name in ("conv1", "conv2")}
    for side, kinds in (
        ("encoder", ("self_attn", "fc1", "fc2")),
        ("decoder", ("self_attn", "encoder_attn", "fc1", "fc2")),
    ):
        for i in range(len(getattr(whisper.model, side).layers)):
            for kind in kinds:
                found[f"{side} {i} {kind}"] = (f"model.{side}.layers.{i}.{kind}",)
    return found | {"embedding and head": EMBEDDING}


class Speech:
    """Clips of all sets with what the full model expects at each token of their texts."""

    def __init__(self, model: str, data: Path, clips: int) -> None:
        self.full = bind(*load_model(model))
        self.clips: list[Clip] = []
        self.tokens: list[tuple[list[int], int]] = []
        for one in ENGLISH.values():
            said = spread(one.speech(data), clips)
            own = [u.load() for u in said]
            heard = decode_clips(self.full, own, language="en")
            for utterance, clip, text in zip(said, own, heard, strict=True):
                self.clips.append(clip)
                self.tokens.append(self.full.token_ids(in_model_style(utterance.text, text)))
        self.expected = [self.logits(self.full, i) for i in range(len(self.clips))]

    @torch.inference_mode()
    def logits(self, speech: Any, number: int) -> Tensor:
        """Of a clip's text, [T, V] float32."""
        tokens, prompt = self.tokens[number]
        return speech.text_logits(self.clips[number], tokens, prompt, None)

    def kl(self, speech: Any) -> float:
        """Mean over all tokens, nats."""
        found = Divergence()
        for number, expected in enumerate(self.expected):
            found.add(expected, self.logits(speech, number))
        return found.mean


def rounded(model: str, variant: str) -> Any:
    """The whole network, quantised without experts."""
    network, _ = load_model(model)
    config = SAMLConfig(num_experts=0)
    if variant == PLAIN:
        apply_saml(network, config)
        return network
    compress(network, config)
    if compression_of(network).calibration is None:
        raise SAMLError(f"{model}: no calibrated rounding ships for it; give --model tiny.en")
    return network


def main(
    data: Annotated[Path, typer.Option(help="Holds vctk/, speechocean762/ and so on.")],
    json_file: Annotated[Path, typer.Option("--json", help="Results.")],
    figure: Annotated[Path | None, typer.Option(help="A PNG of them.")] = None,
    model: Annotated[str, typer.Option(help="A Whisper.")] = "tiny.en",
    clips: Annotated[int, typer.Option(min=1, help="Of each set.")] = 10,
) -> None:
    quiet_libraries()
    check_output(json_file, is_json("kl"), True)
    speech = Speech(model, data, clips)
    titles: list[str] = []
    kl: dict[str, list[float]] = {PLAIN: [], SHIPPED: []}
    with progress("rounding") as show:
        for variant, found in kl.items():
            source = rounded(model, variant)
            network, processor = load_model(model)
            plan = parts(network)
            titles = list(plan)
            for title, names in plan.items():
                for name in names:
                    network.set_submodule(name, source.get_submodule(name))
                found.append(round(speech.kl(bind(network, processor)), 6))
                show(len(found), len(plan), f"{variant}: {title}")
    results = {
        "about": about(torch.device("cpu")) | {"model": model},
        "clips": len(speech.clips),
        "tokens": sum(len(expected) for expected in speech.expected),
        "parts": titles,
        "kl": kl,
    }
    write_json(json_file, results)
    if figure is not None:
        plot(results, figure)
    table = Table("part", *(f"KL, {variant}" for variant in kl), title=model)
    for title, *values in zip(titles, *kl.values(), strict=True):
        table.add_row(title, *(f"{value:.4f}" for value in values))
    Console().print(table)


def plot(results: dict[str, Any], path: Path) -> None:
    """A PNG: KL against the parts that are rounded so far."""
    figure = new_figure(9.0, 4.5)
    axes = figure.subplots()
    places = range(len(results["parts"]))
    for variant, values in results["kl"].items():
        axes.plot(places, values, marker=".", label=variant)
    axes.set_xticks(list(places), results["parts"], rotation=90, fontsize=7)
    axes.set(ylabel="KL to full precision, nats a token", ylim=(0, None))
    axes.set_title(f"{results['about']['model']}: rounded up to and with", fontsize=9)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    write_figure(path, figure)
