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
and outlying columns no longer set the scales of their blocks.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from saml_kernels import QuantizedTensor, SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.quantization.rounding import round_together
from saml_models.audio import SAMPLE_RATE
from saml_models.compress.calibration import Calibration
from saml_models.compress.calibration_speech import CalibrationClip, clips_hash
from saml_models.storage import read_tensors, write_tensors
from saml_models.window import FRAMES_PER_SECOND, log_mel, window_frames

__all__ = ["Recipe", "calibrate"]

MARGIN = 10.0  # seconds of silence after a clip, as a quantised Whisper hears it
AFTER = 1.0  # seconds after the speech that count fully
_CODES = ".weight.codes"
SPARSE = 10  # of the frames later on, one in so many is looked at
EMBEDDING = "model.decoder.embed_tokens"
POSITIONS = "model.decoder.embed_positions.weight"


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
    """

    damping: float = 0.05
    pull: float = 0.05
    look_up: float = 0.5
    refinements: int = 1
    encoder_target: bool = True
    decoder_target: bool = True
    biases: bool = True
    shift: bool = True


@torch.no_grad()
def calibrate(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[CalibrationClip],
    config: SAMLConfig | None = None,
    recipe: Recipe | None = None,
    *,
    folder: Path | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Calibration:
    """Round every layer of a Whisper that `apply_saml` would round.

    Args:
        model: at full precision, float32, on the CPU; left as it is.
        processor: of that model.
        clips: from `prepare_clips`.
        config: format, block size and double quantisation; None is `SAMLConfig()`.
        recipe: None is `Recipe()`.
        folder: finished stages are kept there, and found again when the same call is repeated.
        on_progress: called with stages done, their number and the name of the last one.

    Raises:
        SAMLError: the model is no Whisper at full precision, or there are no clips.
    """
    kind = type(model).__name__
    if not isinstance(model, WhisperForConditionalGeneration) or hasattr(model, "saml_config"):
        raise SAMLError(f"{kind}: calibration takes a Whisper at full precision")
    if not clips:
        raise SAMLError("calibration: no clips; see prepare_clips")
    run = _Run(model, processor, clips, config or SAMLConfig(), recipe or Recipe())
    return run.whole(folder, on_progress)


class _Moments:
    """Sums over inputs x' [T, K] of a stage's rounded side and what goes with them, y [T, M]."""

    def __init__(self, width: int, others: int) -> None:
        self.inputs = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(others, width, dtype=torch.float64)
        self.input_sum = torch.zeros(width, dtype=torch.float64)
        self.other_sum = torch.zeros(others, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        self.inputs += x.T @ x
        self.cross += y.T @ x
        self.input_sum += x.sum(dim=0)
        self.other_sum += y.sum(dim=0)
        self.rows += len(x)

    def means(self, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """E[x' x'^T], E[y x'^T], E[x'], E[y]; the first two less the means' products if centred."""
        x, y = self.input_sum / self.rows, self.other_sum / self.rows
        inputs, cross = self.inputs / self.rows, self.cross / self.rows
        if centred:
            inputs, cross = inputs - x.outer(x), cross - y.outer(x)
        return inputs, cross, x, y


Pairs = Iterable[tuple[Tensor, Tensor]]


class _Run:
    """One calibration: both models, and where they are in every clip."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        clips: Sequence[CalibrationClip],
        config: SAMLConfig,
        recipe: Recipe,
    ) -> None:
        self.full, self.clips, self.config, self.recipe = model, clips, config, recipe
        self.processor = processor
        self.rounded: Any = copy.deepcopy(model)
        for parameter in self.rounded.parameters():
            parameter.copy_(parameter.half())
        self.made = Calibration({}, {}, self._about())
        self.x: list[Tensor] = []  # of each clip, on the full side
        self.y: list[Tensor] = []  # on the rounded one

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
        layers = self.full.config.encoder_layers, self.full.config.decoder_layers
        self.total, self.done = 2 + 4 * layers[0] + 2 + 6 * layers[1], 0
        self.on_progress, self.folder = on_progress, folder
        self.mark = _fingerprint(self.full, self.made.about)
        self._encoder()
        self._decoder()
        return self.made

    def _stage(
        self,
        names: Sequence[str],
        pairs: Callable[[], Pairs],
        *,
        aimed: bool,
        outputs: bool = False,
    ) -> None:
        """Round the layers of these names.

        Args:
            names: of layers with the same inputs.
            pairs: of each clip: inputs on the rounded side, and those on the full side or, with
                `outputs`, what the one layer should put out, less its bias.
            aimed: at the full side.
        """
        self._keep(names[0], partial(self._round, names, pairs, aimed, outputs))

    def _keep(self, title: str, make: Callable[[], tuple[dict[str, QuantizedTensor], Any]]) -> None:
        """Take a stage's results from the folder, or make them and leave them there."""
        path = None if self.folder is None else self.folder / f"{title}.safetensors"
        found = None if path is None else _read_stage(path, self.mark, self.full, self.config)
        weights, parameters = found or make()
        if path is not None and found is None:
            _write_stage(path, self.mark, weights, parameters)
        for name, weight in weights.items():
            layer = self.rounded.get_submodule(name)
            layer.weight.copy_(weight.dequantize())
        for name, value in parameters.items():
            self.rounded.get_parameter(name).copy_(value)
        self.made.weights |= weights
        self.made.parameters |= parameters
        self.done += 1
        if self.on_progress:
            self.on_progress(self.done, self.total, title)

    def _round(
        self, names: Sequence[str], pairs: Callable[[], Pairs], aimed: bool, outputs: bool
    ) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        moments = None
        for x, y in pairs():
            moments = moments or _Moments(x.shape[1], y.shape[1])
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
                parameters[f"{name}.bias"] = _half(layer.bias + (mean - found).float())
        return dict(zip(names, made, strict=True)), parameters

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

    # --- the encoder --------------------------------------------------------------------------

    def _encoder(self) -> None:
        full, rounded = self.full.model.encoder, self.rounded.model.encoder
        aimed = self.recipe.encoder_target
        frames = [window_frames(len(clip.samples), MARGIN) for clip in self.clips]
        mels = [
            log_mel(self.processor, [clip.samples], count)
            for clip, count in zip(self.clips, frames, strict=True)
        ]

        def first() -> Pairs:
            for clip, mel in zip(self.clips, mels, strict=True):
                rows = _heard(clip, _unfolded(full.conv1, mel), FRAMES_PER_SECOND)
                yield rows, rows

        def second() -> Pairs:
            for clip, mel in zip(self.clips, mels, strict=True):
                yield tuple(  # type: ignore[misc]
                    _heard(clip, _unfolded(e.conv2, F.gelu(e.conv1(mel))), self._rate)
                    for e in (rounded, full)
                )

        self._stage(["model.encoder.conv1"], first, aimed=False)
        self._stage(["model.encoder.conv2"], second, aimed=aimed)
        for mel in mels:
            for encoder, own in ((full, self.x), (rounded, self.y)):
                hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel))))[0].T
                own.append(hidden + encoder.embed_positions.weight[: len(hidden)])
        for number in range(len(full.layers)):
            at = f"model.encoder.layers.{number}"
            self._attention(at, "self_attn", self._rows, aimed=aimed)
            self._feed_forward(at, self._rows, aimed=aimed)
        for encoder, own in ((full, self.x), (rounded, self.y)):
            own[:] = [encoder.layer_norm(hidden) for hidden in own]

    _rate = FRAMES_PER_SECOND // 2

    def _rows(self, clip: CalibrationClip, rows: Tensor) -> Tensor:
        """Encoder frames that count."""
        return _heard(clip, rows, self._rate)

    # --- the decoder --------------------------------------------------------------------------

    def _decoder(self) -> None:
        full, rounded = self.full.model.decoder, self.rounded.model.decoder
        heard, heard_rounded = self.x, self.y
        names = [
            f"model.decoder.layers.{number}.encoder_attn.{kind}_proj"
            for number in range(len(full.layers))
            for kind in "kv"
        ]

        def encoded() -> Pairs:
            for clip, x, y in zip(self.clips, heard, heard_rounded, strict=True):
                yield self._rows(clip, y), self._rows(clip, x)

        self._stage(names, encoded, aimed=self.recipe.encoder_target)
        tokens = [torch.tensor(clip.tokens[:-1]) for clip in self.clips]
        self._keep(EMBEDDING, partial(self._embedding, tokens, heard))
        for decoder, own in ((full, "x"), (rounded, "y")):
            start = [
                decoder.embed_tokens(ids) + decoder.embed_positions.weight[: len(ids)]
                for ids in tokens
            ]
            setattr(self, own, start)
        aimed = self.recipe.decoder_target
        for number in range(len(full.layers)):
            at = f"model.decoder.layers.{number}"
            self._attention(at, "self_attn", _all, aimed=aimed, causal=True)
            self._attention(at, "encoder_attn", _all, aimed=aimed, encoded=(heard, heard_rounded))
            self._feed_forward(at, _all, aimed=aimed)

    def _embedding(
        self, tokens: list[Tensor], heard: list[Tensor]
    ) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        decoder = self.full.model.decoder
        table = decoder.embed_tokens.weight.detach()
        hessian = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
        said = torch.zeros(len(table), dtype=torch.float64)
        for clip, ids, encoded in zip(self.clips, tokens, heard, strict=True):
            hidden = decoder(
                input_ids=ids[None], encoder_hidden_states=encoded[None], use_cache=False
            ).last_hidden_state[0, clip.prompt - 1 :]
            hessian += hidden.T @ hidden
            said += (hidden @ table.T).softmax(dim=-1).sum(dim=0)
        parameters = {}
        if self.recipe.shift:
            vector = _shift(table, said)
            table = table - vector
            parameters[POSITIONS] = _half(decoder.embed_positions.weight + vector)
        (weight,) = self._rounded([table], hessian, self.recipe.look_up, EMBEDDING)
        return {EMBEDDING: weight}, parameters

    # --- what both have -----------------------------------------------------------------------

    def _attention(
        self,
        at: str,
        kind: str,
        rows: Callable[[CalibrationClip, Tensor], Tensor],
        *,
        aimed: bool,
        causal: bool = False,
        encoded: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> None:
        """Query, key, value (with `encoded` the query alone), then the output projection."""
        full, rounded = (m.get_submodule(at) for m in (self.full, self.rounded))
        norm = f"{kind}_layer_norm"
        kinds = ("q",) if encoded else ("q", "k", "v")

        def inputs() -> Pairs:
            for clip, x, y in zip(self.clips, self.x, self.y, strict=True):
                yield rows(clip, getattr(rounded, norm)(y)), rows(clip, getattr(full, norm)(x))

        self._stage([f"{at}.{kind}.{k}_proj" for k in kinds], inputs, aimed=aimed)
        mixed: list[Tensor] = []
        wanted: list[Tensor] = []
        project = getattr(full, kind).out_proj
        for i, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
            own, other = (None, None) if encoded is None else (encoded[0][i], encoded[1][i])
            put_out = F.linear(
                _mix(getattr(full, kind), getattr(full, norm)(x), own, causal), project.weight
            )
            mixed.append(_mix(getattr(rounded, kind), getattr(rounded, norm)(y), other, causal))
            wanted.append(put_out)

        def outputs() -> Pairs:
            for clip, have, want in zip(self.clips, mixed, wanted, strict=True):
                yield rows(clip, have), rows(clip, want)

        self._stage([f"{at}.{kind}.out_proj"], outputs, aimed=aimed, outputs=True)
        project_rounded = getattr(rounded, kind).out_proj
        for i, (have, want) in enumerate(zip(mixed, wanted, strict=True)):
            self.x[i] = self.x[i] + want + project.bias
            self.y[i] = self.y[i] + project_rounded(have)

    def _feed_forward(
        self, at: str, rows: Callable[[CalibrationClip, Tensor], Tensor], *, aimed: bool
    ) -> None:
        full, rounded = (m.get_submodule(at) for m in (self.full, self.rounded))

        def inputs() -> Pairs:
            for clip, x, y in zip(self.clips, self.x, self.y, strict=True):
                yield (
                    rows(clip, rounded.final_layer_norm(y)),
                    rows(clip, full.final_layer_norm(x)),
                )

        def inside(layer: Any, hidden: Tensor) -> Tensor:
            return layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden)))

        wanted = [F.linear(inside(full, x), full.fc2.weight) for x in self.x]

        def outputs() -> Pairs:
            for clip, y, want in zip(self.clips, self.y, wanted, strict=True):
                yield inside(rounded, rows(clip, y)), rows(clip, want)

        self._stage([f"{at}.fc1"], inputs, aimed=aimed)
        self._stage([f"{at}.fc2"], outputs, aimed=aimed, outputs=True)
        self.x = [x + want + full.fc2.bias for x, want in zip(self.x, wanted, strict=True)]
        self.y = [y + rounded.fc2(inside(rounded, y)) for y in self.y]


def _half(value: Tensor) -> Tensor:
    """As it is stored."""
    return value.detach().half().float()


def _all(clip: CalibrationClip, rows: Tensor) -> Tensor:
    return rows


def _heard(clip: CalibrationClip, rows: Tensor, rate: int) -> Tensor:
    """Frames up to a second past the speech, and one in `SPARSE` of those after it.

    Args:
        rows: [T, K], `rate` of them a second.
    """
    speech = round((len(clip.samples) / SAMPLE_RATE + AFTER) * rate)
    return torch.cat((rows[:speech], rows[speech::SPARSE]))


def _unfolded(conv: Any, x: Tensor) -> Tensor:
    """x [1, K, T] -> [T', K * kernel]: what the filters of a convolution are multiplied with."""
    (kernel,), (stride,), (padding,) = conv.kernel_size, conv.stride, conv.padding
    columns = F.unfold(x.unsqueeze(2), (1, kernel), padding=(0, padding), stride=(1, stride))
    return columns[0].T


def _mix(attention: Any, hidden: Tensor, encoded: Tensor | None, causal: bool) -> Tensor:
    """Attention of one clip before its output projection: hidden [T, d] -> [T, d]."""
    source = hidden if encoded is None else encoded

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), attention.num_heads, -1).transpose(0, 1)

    mixed = F.scaled_dot_product_attention(
        heads(attention.q_proj(hidden) * attention.scaling),
        heads(attention.k_proj(source)),
        heads(attention.v_proj(source)),
        is_causal=causal,
        scale=1.0,
    )
    return mixed.transpose(0, 1).reshape(len(hidden), -1)


def _shift(table: Tensor, said: Tensor) -> Tensor:
    """What to subtract from every row: half the mean of what is said, half the plain mean.

    Args:
        table: [V, d].
        said: [V], how often the model says each token.
    """
    often = (said / said.sum()).float() @ table
    return (often + table.mean(dim=0)) / 2


def _fingerprint(model: Any, about: dict[str, Any]) -> str:
    """SHA-256 (hex) of all that decides the results: weights and recipe."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write_stage(
    path: Path, mark: str, weights: dict[str, QuantizedTensor], parameters: dict[str, Tensor]
) -> None:
    tensors = dict(parameters)
    for name, weight in weights.items():
        tensors |= {f"{name}.weight.{part}": value for part, value in weight.named_buffers()}
    write_tensors(path, tensors, {"fingerprint": mark})


def _read_stage(
    path: Path, mark: str, model: Any, config: SAMLConfig
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]] | None:
    """A stage that was finished before, by the same call; None where there is none."""
    try:
        tensors, about = read_tensors(path)
    except SAMLError:
        return None
    if about.get("fingerprint") != mark:
        return None
    weights = {}
    names = [k.removesuffix(_CODES) for k in tensors if k.endswith(_CODES)]
    for name in names:
        weight = QuantizedTensor.empty(
            model.get_submodule(name).weight.shape,
            config.format,
            config.block_size,
            config.double_quant,
        )
        parts = {part: tensors.pop(f"{name}.weight.{part}", None) for part in weight.state_dict()}
        if any(part is None for part in parts.values()):
            return None
        weight.load_state_dict(parts)
        weights[name] = weight
    return weights, tensors
