"""Rounding a Whisper by what its layers hear: codes and scales chosen on calibration speech.

Two copies of the model run side by side over the clips, stage by stage: one at full precision, one
whose layers are rounded as soon as their inputs are known. A stage is the layers with one input in
common (query, key and value; the first half of a feed-forward block; ...). Each is rounded for the
inputs x' that the rounded layers before it put out, towards what the full model puts out there:

    minimise  sum |Q x' - W x|^2   =   tr((Q - W') H (Q - W')^T) + constant,
    W' = (W sum x x'^T + l W) (H + l I)^-1,   H = sum x' x'^T,

and `saml_kernels.quantization.rounding` does so for W' and H (GPTQ, arXiv 2210.17323; the target
that makes good the errors of earlier layers as in GPTAQ, arXiv 2504.02692). A layer with a bias has
means subtracted from x and x' and the bias moved by what is left; a constant added to all keys
changes no attention, so keys are treated alike.

The token embedding is the output head too. Its H is that of the decoder's last hidden states, with
a multiple of the identity that keeps it a look-up table. A vector is subtracted from all its rows
beforehand and added to the decoder's positions: every logit of a token moves by the same amount,
and outlying columns no longer set the scales of their blocks. The rows whose errors tell most in
what the model says get their error in low bits besides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saml_kernels import QuantizedTensor, SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.quantization.rounding import round_together
from saml_models.compress.calibration import Calibration
from saml_models.compress.calibration_rows import Moments, Pairs
from saml_models.compress.calibration_speech import (
    CLIPS,
    CalibrationClip,
    choose_utterances,
    clips_hash,
    prepare_clips,
)
from saml_models.compress.calibration_stages import fingerprint, read_stage, write_stage
from saml_models.compress.calibration_walk import Found, Walk, half, stages
from saml_models.data.corpora import Utterance
from saml_models.models.interface import SpeechModel
from saml_models.models.whisper.speech_model import WhisperSpeechModel

__all__ = ["Recipe", "calibrate", "calibrate_on", "check_can_calibrate"]


@dataclass(frozen=True)
class Recipe:
    """How a model is calibrated.

    Attributes:
        damping: of the mean of H's diagonal, added to it.
        pull: l above, in the same unit.
        look_up: the identity's share in the embedding's H, in the same unit.
        refinements: rounds of coordinate descent.
        encoder_target, decoder_target: aim at the full model's outputs on rounded inputs (the
            decoder's cross-attention keys and values go with the encoder); else at W x'.
        biases: move biases by the mean of what is left.
        shift: subtract a vector from the embedding's rows.
        finer_rows: rows of the embedding that get twice the bits, in formats of 4.
    """

    damping: float = 0.05
    pull: float = 0.05
    look_up: float = 0.5
    refinements: int = 1
    encoder_target: bool = True
    decoder_target: bool = True
    biases: bool = True
    shift: bool = True
    finer_rows: int = 256


@torch.no_grad()
def calibrate(
    speech: SpeechModel,
    clips: Sequence[CalibrationClip],
    config: SAMLConfig | None = None,
    recipe: Recipe | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Calibration:
    """Round every layer of a Whisper that `apply_saml` would round.

    Args:
        speech: a Whisper at full precision, float32, on the CPU; left as it is.
        clips: from `prepare_clips`.
        config: format, block size and double quantisation; None is `SAMLConfig()`.
        recipe: None is `Recipe()`.
        about: where the clips are from, for the model's description.
        folder: finished stages are kept there, and found again when the same call is repeated.
        on_progress: called with stages done, their number and the name of the last one.

    Raises:
        SAMLError: the model is no Whisper at full precision, or there are no clips.
    """
    check_can_calibrate(speech)
    if not clips:
        raise SAMLError("calibration: no clips; see prepare_clips")
    run = _Run(speech, clips, config or SAMLConfig(), recipe or Recipe(), dict(about or {}))
    return run.whole(folder, on_progress)


def calibrate_on(
    speech: SpeechModel,
    utterances: Sequence[Utterance],
    config: SAMLConfig | None = None,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    count: int = CLIPS,
    folder: Path | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Calibration:
    """`calibrate` on some of the utterances and copies of them in noise.

    Args:
        speech, config, recipe, folder: as for `calibrate`.
        utterances: of which the first of 1 to 30 s are taken, in the order of
            `choose_utterances`; those without text are given the model's own.
        seed: of their choice and of the noise.
        count: of the clips, copies not counted.
        on_progress: called with clips and stages done, their number and the name of the last one.

    Raises:
        SAMLError: as `calibrate`, `choose_utterances` and `prepare_clips`.
    """
    check_can_calibrate(speech)
    drawn = choose_utterances(utterances, len(utterances), seed)
    most, total, heard = min(count, len(drawn)), stages(speech.network), 0

    def on_clip(done: int) -> None:
        nonlocal heard
        heard += done
        if on_progress:
            on_progress(heard, most + total, "what is said")

    def on_stage(done: int, total: int, title: str) -> None:
        if on_progress:
            on_progress(most + done, most + total, title)

    clips = prepare_clips(speech, drawn, seed, count=count, on_done=on_clip)
    return calibrate(
        speech,
        clips,
        config,
        recipe,
        about={"seed": seed},
        folder=folder,
        on_progress=on_stage,
    )


def check_can_calibrate(speech: SpeechModel) -> None:
    """Refuse what `calibrate` cannot take.

    Raises:
        SAMLError: no Whisper, compressed already, or not float32 on the CPU.
    """
    network = speech.network
    kind = type(network).__name__
    if not isinstance(speech, WhisperSpeechModel) or hasattr(network, "saml"):
        raise SAMLError(f"{kind}: calibration takes a Whisper at full precision")
    if speech.device.type != "cpu" or speech.dtype != torch.float32:
        raise SAMLError(
            f"{kind}: {speech.dtype} on {speech.device}; calibration takes float32 on the CPU"
        )


class _Run(Walk):
    """One calibration: both models, and where they are in every clip."""

    def __init__(
        self,
        speech: SpeechModel,
        clips: Sequence[CalibrationClip],
        config: SAMLConfig,
        recipe: Recipe,
        about: dict[str, Any],
    ) -> None:
        self.full, self.processor = speech.network, speech.processor
        self.clips, self.config, self.recipe = clips, config, recipe
        self.rounded: Any = copy.deepcopy(self.full)
        for parameter in self.rounded.parameters():
            parameter.copy_(parameter.half())
        self.made = Calibration({}, {}, self._about() | about)

    def _about(self) -> dict[str, Any]:
        config = self.config
        return {
            "recipe": asdict(self.recipe),
            "clips": len(self.clips),
            "clips_sha256": clips_hash(self.clips),
            "format": config.format,
            "block_size": config.block_size,
            "double_quant": config.double_quant,
        }

    # --- stages, kept and found again ---------------------------------------------------------

    def whole(
        self, folder: Path | None, on_progress: Callable[[int, int, str], None] | None
    ) -> Calibration:
        """All stages in their order."""
        self.total, self.done = stages(self.full), 0
        self.on_progress, self.folder = on_progress, folder
        self.mark = fingerprint(self.full, self.made.about)
        self._decoder(self._encoder())
        return self.made

    def _stage(
        self,
        names: Sequence[str],
        pairs: Callable[[], Pairs],
        *,
        aimed: bool,
        outputs: bool = False,
    ) -> None:
        self._keep(names[0], partial(self._round, names, pairs, aimed, outputs))

    def _keep(self, title: str, make: Callable[[], Found]) -> None:
        path = None if self.folder is None else self.folder / f"{title}.safetensors"
        found = None if path is None else read_stage(path, self.mark, self.full, self.config)
        weights, parameters, finer = found or make()
        if path is not None and found is None:
            write_stage(path, self.mark, weights, parameters, finer)
        for name, weight in weights.items():
            layer = self.rounded.get_submodule(name)
            layer.weight.copy_(weight.dequantize())
        for name, more in finer.items():
            self.rounded.get_submodule(name).weight[more.rows.long()] += more.weight.dequantize()
        for name, value in parameters.items():
            self.rounded.get_parameter(name).copy_(value)
        self.made.weights |= weights
        self.made.parameters |= parameters
        self.made.finer |= finer
        self.done += 1
        if self.on_progress:
            self.on_progress(self.done, self.total, title)

    def _round(
        self, names: Sequence[str], pairs: Callable[[], Pairs], aimed: bool, outputs: bool
    ) -> Found:
        moments = None
        for x, y in pairs():
            moments = moments or Moments(x.shape[1], y.shape[1])
            moments.add(x, y)
        assert moments is not None
        recipe, layers = self.recipe, [self.full.get_submodule(name) for name in names]
        hessian, cross, mean_x, mean_y = moments.means(recipe.biases)
        weights = [layer.weight.detach().double().flatten(1) for layer in layers]
        targets, wanted = weights, [weight @ mean_x for weight in weights]
        if aimed:
            pull = recipe.pull * hessian.diagonal().mean()
            damped = hessian.clone()
            damped.diagonal().add_(pull)
            factor = torch.linalg.cholesky(damped)
            sums = [cross] if outputs else [weight @ cross for weight in weights]
            targets = [
                torch.cholesky_solve((own + pull * weight).T, factor).T
                for own, weight in zip(sums, weights, strict=True)
            ]
            wanted = [mean_y] if outputs else [weight @ mean_y for weight in weights]
        made = self._rounded(
            [t.view_as(layer.weight) for t, layer in zip(targets, layers, strict=True)],
            hessian,
            recipe.damping,
            names[0],
        )
        parameters = {}
        for name, layer, weight, mean in zip(names, layers, made, wanted, strict=True):
            if recipe.biases and layer.bias is not None:
                found = weight.dequantize(torch.float64).flatten(1) @ mean_x
                parameters[f"{name}.bias"] = half(layer.bias + (mean - found).float())
        return dict(zip(names, made, strict=True)), parameters, {}

    def _rounded(
        self, targets: list[Tensor], hessian: Tensor, damping: float, name: str
    ) -> list[QuantizedTensor]:
        config = self.config
        return round_together(
            targets,
            hessian,
            config.format,
            config.block_size,
            config.double_quant,
            damping=damping,
            refinements=self.recipe.refinements,
            name=name,
        )
