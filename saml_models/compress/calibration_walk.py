"""The layers of a Whisper in the order of a calibration, each with its inputs on both sides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_kernels import QuantizedTensor, quantize
from saml_kernels.layers.embedding import FinerRows
from saml_models.compress.calibration_rows import (
    TOGETHER,
    Pairs,
    Rows,
    attended,
    counted_frames,
    shift_of,
    unfolded,
)
from saml_models.compress.calibration_speech import CalibrationClip
from saml_models.models.interface import QUANTISED_MARGIN, SHORT_WINDOW_MARGIN
from saml_models.models.whisper.conformer import ConformerWhisperLayer
from saml_models.models.whisper.windows import FRAMES_PER_SECOND, log_mel, window_frames

__all__ = ["Walk", "finer_rows", "half", "stages"]

LONG = 4  # one clip in so many has a window as a quantised Whisper is given, the others a short one
EMBEDDING = "model.decoder.embed_tokens"
POSITIONS = "model.decoder.embed_positions.weight"

Found = tuple[dict[str, QuantizedTensor], dict[str, Tensor], dict[str, FinerRows]]


class Walk(ABC):
    """Where both models are in every clip; what a stage does with that is for who inherits.

    Attributes:
        full, rounded: the model at full precision, and its copy that is rounded layer by layer.
        processor: of both.
        clips: that are heard.
        recipe: says which stages aim at the full side.
    """

    full: Any
    rounded: Any
    processor: Any
    clips: Sequence[CalibrationClip]
    recipe: Any

    @abstractmethod
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
            outputs: see `pairs`.
        """

    @abstractmethod
    def _keep(self, title: str, make: Callable[[], Found]) -> None:
        """Take a stage's results from where they were left, or make them and leave them there.

        They are weights, parameters and finer rows, by name.
        """

    @abstractmethod
    def _rounded(
        self, targets: list[Tensor], hessian: Tensor, damping: float, name: str
    ) -> list[QuantizedTensor]:
        """Weights near to targets with one H."""

    # --- the encoder --------------------------------------------------------------------------

    def _encoder(self) -> Rows:
        full, rounded = self.full.model.encoder, self.rounded.model.encoder
        aimed = self.recipe.encoder_target
        mels = [
            log_mel(self.processor, [clip.samples], window_frames(len(clip.samples), margin))
            for clip, margin in zip(self.clips, _margins(len(self.clips)), strict=True)
        ]

        def first() -> Pairs:
            for clip, mel in zip(self.clips, mels, strict=True):
                rows = unfolded(full.conv1, mel)
                rows = rows[counted_frames(clip, len(rows), FRAMES_PER_SECOND)]
                yield rows, rows

        def second() -> Pairs:
            for clip, mel in zip(self.clips, mels, strict=True):
                rows = [unfolded(e.conv2, F.gelu(e.conv1(mel))) for e in (rounded, full)]
                heard = counted_frames(clip, len(rows[0]), _RATE)
                yield rows[0][heard], rows[1][heard]

        self._stage(["model.encoder.conv1"], first, aimed=False)
        self._stage(["model.encoder.conv2"], second, aimed=aimed)

        def embedded(encoder: Any, mel: Tensor) -> Tensor:
            hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel))))[0].T
            return hidden + encoder.embed_positions.weight[: len(hidden)]

        x = [embedded(full, mel) for mel in mels]
        heard = [
            counted_frames(clip, len(one), _RATE) for clip, one in zip(self.clips, x, strict=True)
        ]
        rows = Rows.of(x, [embedded(rounded, mel) for mel in mels], heard)
        for number, layer in enumerate(full.layers):
            at = f"model.encoder.layers.{number}"
            conformer = isinstance(layer, ConformerWhisperLayer)
            if conformer:
                branch = f"{at}.half_step"
                self._feed_forward(rows, branch, aimed=aimed, norm="layer_norm", share=0.5)
            self._attention(rows, at, "self_attn", aimed=aimed)
            if conformer:
                self._convolution(rows, f"{at}.conv_module", aimed=aimed)
            self._feed_forward(rows, at, aimed=aimed)
        rows.x, rows.y = full.layer_norm(rows.x), rounded.layer_norm(rows.y)
        return rows

    # --- the decoder --------------------------------------------------------------------------

    def _decoder(self, heard: Rows) -> Rows:
        full, rounded = self.full.model.decoder, self.rounded.model.decoder
        names = [
            f"model.decoder.layers.{number}.encoder_attn.{kind}_proj"
            for number in range(len(full.layers))
            for kind in "kv"
        ]

        def encoded() -> Pairs:
            return heard.pairs(heard.y.__getitem__, heard.x.__getitem__)

        self._stage(names, encoded, aimed=self.recipe.encoder_target)
        tokens = [torch.tensor(clip.tokens[:-1]) for clip in self.clips]
        self._keep(EMBEDDING, partial(self._embedding, tokens, heard))

        def embedded(decoder: Any, ids: Tensor) -> Tensor:
            return decoder.embed_tokens(ids) + decoder.embed_positions.weight[: len(ids)]

        rows = Rows.of(
            [embedded(full, ids) for ids in tokens],
            [embedded(rounded, ids) for ids in tokens],
            [torch.ones(len(ids), dtype=torch.bool) for ids in tokens],
        )
        aimed = self.recipe.decoder_target
        for number in range(len(full.layers)):
            at = f"model.decoder.layers.{number}"
            self._attention(rows, at, "self_attn", aimed=aimed, causal=True)
            self._attention(rows, at, "encoder_attn", aimed=aimed, encoded=heard)
            self._feed_forward(rows, at, aimed=aimed)
        return rows

    def _embedding(self, tokens: list[Tensor], heard: Rows) -> Found:
        decoder = self.full.model.decoder
        table = decoder.embed_tokens.weight.detach()
        hessian = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
        said = torch.zeros(len(table), dtype=torch.float64)
        states = []
        for clip, ids, span in zip(self.clips, tokens, heard.spans, strict=True):
            hidden = decoder(
                input_ids=ids[None], encoder_hidden_states=heard.x[span][None], use_cache=False
            ).last_hidden_state[0, clip.prompt - 1 :]
            states.append(hidden)
            hessian += hidden.T @ hidden
            said += (hidden @ table.T).softmax(dim=-1).sum(dim=0)
        parameters = {}
        if self.recipe.shift:
            vector = shift_of(table, said)
            table = table - vector
            parameters[POSITIONS] = half(decoder.embed_positions.weight + vector)
        (weight,) = self._rounded([table], hessian, self.recipe.look_up, EMBEDDING)
        finer = finer_rows(weight, table, states, self.recipe.finer_rows)
        return {EMBEDDING: weight}, parameters, {EMBEDDING: finer} if finer else {}

    # --- what both have -----------------------------------------------------------------------

    def _attention(
        self,
        state: Rows,
        at: str,
        kind: str,
        *,
        aimed: bool,
        causal: bool = False,
        encoded: Rows | None = None,
    ) -> None:
        """Query, key, value (with `encoded` the query alone), then the output projection."""
        full, rounded = (m.get_submodule(at) for m in (self.full, self.rounded))
        norm = f"{kind}_layer_norm"
        x, y = getattr(full, norm)(state.x), getattr(rounded, norm)(state.y)
        kinds = ("q",) if encoded else ("q", "k", "v")
        self._stage(
            [f"{at}.{kind}.{k}_proj" for k in kinds],
            lambda: state.pairs(y.__getitem__, x.__getitem__),
            aimed=aimed,
        )
        for i, span in enumerate(state.spans):
            own, other = (None, None) if encoded is None else (
                encoded.x[encoded.spans[i]], encoded.y[encoded.spans[i]]
            )  # fmt: skip
            x[span] = attended(getattr(full, kind), x[span], own, causal)
            y[span] = attended(getattr(rounded, kind), y[span], other, causal)
        self._added(state, f"{at}.{kind}.out_proj", x, y, aimed=aimed)

    def _convolution(self, state: Rows, at: str, *, aimed: bool) -> None:
        """A Conformer's convolution module; its depthwise convolution is not rounded."""
        full, rounded = (m.get_submodule(at) for m in (self.full, self.rounded))
        x, y = full.layer_norm(state.x), rounded.layer_norm(state.y)
        self._stage(
            [f"{at}.pointwise_in"],
            lambda: state.pairs(y.__getitem__, x.__getitem__),
            aimed=aimed,
        )
        for span in state.spans:
            for module, rows in ((full, x), (rounded, y)):
                rows[span] = module.mixed(module.pointwise_in(rows[span][None]))[0]
        self._added(state, f"{at}.pointwise_out", x, y, aimed=aimed)

    def _added(self, state: Rows, name: str, x: Tensor, y: Tensor, *, aimed: bool) -> None:
        """A layer whose outputs are added: of x [R, K] on the full side, y on the rounded side."""
        full, rounded = (m.get_submodule(name) for m in (self.full, self.rounded))
        wanted = F.linear(x, full.weight)
        self._stage(
            [name],
            lambda: state.pairs(y.__getitem__, wanted.__getitem__),
            aimed=aimed,
            outputs=True,
        )
        state.x += wanted.add_(full.bias)
        state.y += rounded(y)

    def _feed_forward(
        self,
        state: Rows,
        at: str,
        *,
        aimed: bool,
        norm: str = "final_layer_norm",
        share: float = 1.0,
    ) -> None:
        """Of the outputs a share is added."""
        full, rounded = (m.get_submodule(at) for m in (self.full, self.rounded))
        x, y = getattr(full, norm)(state.x), getattr(rounded, norm)(state.y)
        self._stage(
            [f"{at}.fc1"],
            lambda: state.pairs(y.__getitem__, x.__getitem__),
            aimed=aimed,
        )

        def inside(layer: Any, rows: Tensor) -> Tensor:
            return layer.activation_fn(layer.fc1(rows))

        within = y.new_empty(len(y), rounded.fc1.out_features)  # once: it is the largest of all
        for part in x.split(TOGETHER):
            part.copy_(F.linear(inside(full, part), full.fc2.weight))
        for part, out in zip(y.split(TOGETHER), within.split(TOGETHER), strict=True):
            out.copy_(inside(rounded, part))
        self._stage(
            [f"{at}.fc2"],
            lambda: state.pairs(within.__getitem__, x.__getitem__),
            aimed=aimed,
            outputs=True,
        )
        state.x += x.add_(full.fc2.bias).mul_(share)
        state.y += rounded.fc2(within).mul_(share)


def finer_rows(
    weight: QuantizedTensor, table: Tensor, states: Sequence[Tensor], count: int
) -> FinerRows | None:
    """More bits for the rows of a head whose errors tell most in what the model says.

    To second order, errors e_v of logits change the distribution p by sum_v p_v (1 - p_v) e_v^2 / 2
    (KL, rows taken by themselves).

    Args:
        weight: of 4 bits; others are left as they are.
        table: what it was rounded from, [V, d].
        states: hidden states that the head was given, [T, d] each.
        count: of the rows; 0 is none.
    """
    if not count or weight.format == "int8":
        return None
    error = table - weight.dequantize()
    told = torch.zeros(len(table), dtype=torch.float64)
    for hidden in states:
        p = (hidden @ table.T).softmax(dim=-1)
        told += (p * (1 - p) * (hidden @ error.T).square()).sum(dim=0)
    rows = told.topk(min(count, len(table))).indices.sort().values
    finer = quantize(error[rows], weight.format, weight.block_size, weight.double_quant)
    return FinerRows(rows.int(), finer)


def stages(network: Any) -> int:
    """How many steps a calibration has."""
    config, layers = network.config, network.model.encoder.layers
    conformer = sum(isinstance(layer, ConformerWhisperLayer) for layer in layers)
    return 4 + 4 * (len(layers) + conformer) + 6 * config.decoder_layers


_RATE = FRAMES_PER_SECOND // 2  # of the encoder


def _margins(count: int) -> Iterator[float]:
    """Seconds of silence after each clip."""
    return (SHORT_WINDOW_MARGIN if i % LONG else QUANTISED_MARGIN for i in range(count))


def half(value: Tensor) -> Tensor:
    """As it is stored."""
    return value.detach().half().float()
