"""Replacing the layers of a model: every linear, pointwise convolution and embedding."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from saml_kernels import SAMLConfig, SAMLEmbedding, SAMLLinear
from saml_kernels.errors import SAMLError
from saml_kernels.layers.context import BatchContext, BlockGates
from saml_kernels.layers.conv import QuantizedConv1d, QuantizedConv2d, SAMLPointwiseConv1d
from saml_kernels.layers.embedding import FinerRows, TiedHead
from saml_kernels.quantization.tensor import QuantizedTensor
from saml_models.compress.calibration import Calibration, check_calibration
from saml_models.compress.layers import (
    ATTENTION_PROJECTIONS,
    POSITION_PROJECTIONS,
    Compression,
    quantised_tensors,
)
from saml_models.compress.pretrained_methods import adjust_methods
from saml_models.compress.replaceable import (
    LAYERS,
    Place,
    check_shapes,
    in_full_precision,
    places_of,
    storage,
    tie,
)
from saml_models.compress.shared_routers import (
    attach_shared_routers,
    attention_blocks,
    watch_encoder,
    width_of,
)

__all__ = ["CompressionReport", "replace_layers"]

CROSS_ATTENTIONS = ("encoder_attn", "cross_attn")

_Part = TypeVar("_Part", bound=nn.Module)


@dataclass
class CompressionReport:
    """What `apply_saml` did.

    Attributes:
        replaced: number of layers by new kind.
        kept: what stays in full precision, by name, and why: "depthwise", "grouped", "positions",
            "max_norm", "hooks", "empty", "shared" (its weight, with something that stays), "held"
            (by a list, tuple or dict too), else the type of the module or of its weight.
        full_bytes: float32 bytes of the model before, each tied tensor once.
        memory_bytes: bytes of the model's tensors now (experts still float32; `save` stores less).
        trainable: trainable parameters (experts and routers).
        parameters: parameters of the model before.
    """

    replaced: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    full_bytes: int = 0
    memory_bytes: int = 0
    trainable: int = 0
    parameters: int = 0

    def __str__(self) -> str:  # noqa: D105
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.replaced.items())
        kept = f"; kept as they are: {_grouped(self.kept)}" if self.kept else ""
        return (
            f"{kinds}{kept}; {self.full_bytes / 1e6:.1f} MB in float32 -> "
            f"{self.memory_bytes / 1e6:.1f} MB in memory; "
            f"{self.trainable:,} of {self.parameters:,} parameters trainable "
            f"({100 * self.trainable / max(1, self.parameters):.1f} %)"
        )


def _grouped(kept: dict[str, str]) -> str:
    """How many stay for each reason, and the first of them by name."""
    names: dict[str, list[str]] = {}
    for name, reason in kept.items():
        names.setdefault(reason, []).append(name)
    return ", ".join(
        f"{len(members)} {reason} ({members[0]}{', ...' if len(members) > 1 else ''})"
        for reason, members in names.items()
    )


def replace_layers(
    model: nn.Module,
    config: SAMLConfig,
    *,
    formats: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> CompressionReport:
    """`apply_saml`, for any module: transformers is told nothing of it.

    Raises:
        SAMLError: as `apply_saml` does.
    """
    kind = type(model).__name__
    if quantised_tensors(model):
        raise SAMLError(f"{kind}: already has SAML layers; load a fresh model")
    if isinstance(model, LAYERS):
        raise SAMLError(f"{kind}: is a single layer; use SAMLLinear.from_linear or its like")
    if config.router == "shared" and not hasattr(model, "get_encoder"):
        raise SAMLError("router='shared': needs an encoder and a decoder, as in Whisper")
    check_shapes(model)
    places, reasons = places_of(model)
    if not places:
        kept = _grouped(in_full_precision(model, (), reasons)) or "no weights"
        raise SAMLError(f"{kind}: has no layer that could be replaced; it has {kept}")
    if config.num_experts and not any(_is_target(place.path, config) for place in places):
        raise SAMLError(f"targets={config.targets!r}: {kind} has no such layers; use 'all'")
    if formats and calibration is not None:
        raise SAMLError("formats: a calibration has its own; give one of the two")
    own = _formats_of(formats or {}, places, config)
    finer = _empty_finer(formats or {}, places, own)
    unique = {storage(p): p for p in model.parameters()}
    report = CompressionReport(
        full_bytes=sum(4 * p.numel() for p in unique.values()),
        parameters=sum(p.numel() for p in unique.values()),
    )
    if calibration is not None:
        check_calibration(calibration, model, {place.path for place in places}, config)
    _round_to_half(model)
    if calibration is not None:
        for name, value in calibration.parameters.items():
            parameter = model.get_parameter(name)
            parameter.data = value.to(parameter, copy=True)
    model.requires_grad_(False)
    context = BatchContext()
    blocks = attention_blocks(model) if config.router == "shared" else {}
    made = _replacements(model, places, config, own, context, blocks, calibration)
    for place in places:
        if place.path in finer:
            cast(SAMLEmbedding, made[place.layer]).finer = finer[place.path]
        setattr(place.parent, place.name, made[place.layer])
    for new in made.values():
        report.replaced[type(new).__name__] = report.replaced.get(type(new).__name__, 0) + 1
    if config.router == "shared":
        attach_shared_routers(model, config, context, blocks)
    _run_together(model)
    watch_encoder(model, context)
    adjust_methods(model)
    saml = Compression(model, config, context)
    saml.calibration = None if calibration is None else calibration.about
    model.saml = saml  # type: ignore[assignment]
    experts = saml.experts()
    for parameter in experts.values():
        parameter.requires_grad_(True)
    report.kept = in_full_precision(model, experts, reasons)
    report.trainable = sum(p.numel() for p in experts.values())
    tensors = {storage(t): t for t in model.state_dict().values() if t.numel()}
    report.memory_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    return report


def _run_together(model: nn.Module) -> None:
    """An attention's projections that read the same x share a launch where tokens are few."""
    for path, module in model.named_modules():
        cross = path.endswith(CROSS_ATTENTIONS)  # whose queries read something else
        names = ("k_proj", "v_proj") if cross else ("q_proj", "k_proj", "v_proj")
        layers = [getattr(module, name, None) for name in names]
        if all(isinstance(layer, SAMLLinear) for layer in layers):
            SAMLLinear.together(cast(list[SAMLLinear], layers))


def _formats_of(
    formats: Mapping[str, Any], places: Collection[Place], config: SAMLConfig
) -> dict[str, SAMLConfig]:
    """The configuration of the layers that have a format of their own, by path."""
    layers = {place.path: place.layer for place in places}
    tables = {tie(p.layer): p.path for p in places if isinstance(p.layer, nn.Embedding)}
    own = {}
    for path, format in formats.items():
        if path not in layers:
            raise SAMLError(f"formats: {path}: no layer of that name is put in low bits")
        if isinstance(layers[path], nn.Linear) and tie(layers[path]) in tables:
            raise SAMLError(
                f"formats: {path}: is a head without a weight of its own; give the format of its "
                f"table, {tables[tie(layers[path])]}"
            )
        if isinstance(format, list):
            raise SAMLError(
                f"formats: {path}: its rows are in several formats, which this version of "
                "saml-kernels cannot read; upgrade it"
            )
        try:
            if isinstance(format, Mapping):
                format = format.get("format")
            own[path] = replace(config, format=format)
        except (SAMLError, TypeError) as error:
            raise SAMLError(f"formats: {path}: {error}") from error
    return own


def _empty_finer(
    formats: Mapping[str, Any], places: Collection[Place], own: Mapping[str, SAMLConfig]
) -> dict[str, FinerRows]:
    """Finer rows, by path, for tables that are to be filled from a file.

    Args:
        formats: as for `apply_saml`.
        places: the layers that will be replaced.
        own: what `_formats_of` made of the formats.

    Raises:
        SAMLError: a layer is no table, or has weights, in which calibration finds the rows; or the
            table has not so many rows.
    """
    layers = {place.path: place.layer for place in places}
    finer = {}
    for path, format in formats.items():
        if not isinstance(format, Mapping) or "finer_rows" not in format:
            continue
        layer, config = layers[path], own[path]
        if not isinstance(layer, nn.Embedding) or not layer.weight.is_meta:
            raise SAMLError(f"formats: {path}: finer rows come from a calibration, or from a file")
        table = QuantizedTensor.empty(
            layer.weight.shape, config.format, config.block_size, config.double_quant, "meta"
        )
        finer[path] = FinerRows.empty(format["finer_rows"], table)
    return finer


def _round_to_half(model: nn.Module) -> None:
    """What stays is rounded to how it is stored; tied tensors stay tied."""
    state = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    for name, tensor in state.items():
        if not tensor.is_meta and not torch.isfinite(tensor.to(torch.float16)).all():
            raise SAMLError(f"{name}: holds NaN, infinity or values beyond float16 (65504)")
    rounded: dict[Any, Tensor] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            key = (storage(parameter), parameter.shape, parameter.stride())
            if key not in rounded:
                rounded[key] = parameter.data.to(torch.float16).to(parameter.dtype)
            parameter.data = rounded[key]
    for name, buffer in model.named_buffers():
        if name in state:
            buffer.copy_(buffer.to(torch.float16))


def _replacements(
    model: Any,
    places: list[Place],
    config: SAMLConfig,
    own: dict[str, SAMLConfig],
    context: BatchContext,
    blocks: dict[str, BlockGates],
    calibration: Calibration | None,
) -> dict[nn.Module, nn.Module]:
    """Old layer -> new one; output heads last, as they ask the embedding that they are tied to."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    width = width_of(model)
    tables = {tie(p.layer) for p in places if isinstance(p.layer, nn.Embedding)}
    made: dict[nn.Module, nn.Module] = {}
    tied: dict[int, SAMLEmbedding] = {}
    heads: dict[nn.Module, str] = {}
    found = calibration or Calibration({})
    for place in places:
        layer: Any = place.layer
        if layer in made or layer in heads:  # registered twice
            continue
        if isinstance(layer, nn.Linear) and (layer is head or tie(layer) in tables):
            heads[layer] = place.path
            continue
        block = blocks.get(place.path.rpartition(".")[0])
        made[layer] = new = _replacement(
            place.path,
            layer,
            own.get(place.path, config),
            context,
            block,
            width,
            _beside(layer, found.weights.get(place.path)),
        )
        if isinstance(new, SAMLEmbedding):
            new.finer = _beside(layer, found.finer.get(place.path))
            tied[tie(layer)] = new
    for layer, path in heads.items():
        embedding = tied.get(tie(layer))
        if embedding is not None:
            made[layer] = TiedHead(embedding, layer.bias)
        else:
            made[layer] = SAMLLinear.from_linear(
                layer, _without_experts(own.get(path, config)), context
            )
    for layer, new in made.items():
        new.train(layer.training)
    return made


def _beside(layer: nn.Module, part: _Part | None) -> _Part | None:
    """What a calibration found, on the layer's device; the calibration keeps its own."""
    device = cast(Tensor, layer.weight).device
    if part is None or next(part.buffers()).device == device:
        return part
    return copy.deepcopy(part).to(device)


def _replacement(
    path: str,
    layer: nn.Module,
    config: SAMLConfig,
    context: BatchContext,
    block: BlockGates | None,
    width: int | None,
    weight: QuantizedTensor | None,
) -> nn.Module:
    name = path.rsplit(".", 1)[-1]
    if isinstance(layer, nn.Linear):
        wanted = _is_target(path, config)
        if name in POSITION_PROJECTIONS or (config.router == "shared" and block is None):
            wanted = False
        own = config if wanted else _without_experts(config)
        # A decoder sees tokens one at a time; its k and v of the encoder's output are the exception
        decoder = ".decoder." in f".{path}" and not path.endswith(
            ("encoder_attn.k_proj", "encoder_attn.v_proj")
        )
        clip_width = width if decoder else None
        return SAMLLinear.from_linear(
            layer, own, context, clip_width=clip_width, block=block, weight=weight
        )
    if isinstance(layer, nn.Conv1d):
        bare = layer.padding in ((0,), "same", "valid")
        if layer.kernel_size == (1,) and layer.stride == (1,) and bare:
            wanted = _is_target(path, config) and config.router != "shared"
            return SAMLPointwiseConv1d.from_conv(
                layer, config if wanted else _without_experts(config), context, weight
            )
        return QuantizedConv1d(layer, config, weight)
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d(layer, config, weight)
    return SAMLEmbedding.from_embedding(cast(nn.Embedding, layer), config, weight)


def _is_target(path: str, config: SAMLConfig) -> bool:
    """Whether `config.targets` names a layer."""
    parts = path.split(".")
    if config.targets == "attention":
        return parts[-1] in ATTENTION_PROJECTIONS
    return config.targets == "all" or config.targets in parts


def _without_experts(config: SAMLConfig) -> SAMLConfig:
    return SAMLConfig(
        num_experts=0,
        format=config.format,
        block_size=config.block_size,
        double_quant=config.double_quant,
    )
