"""A quantised model with experts on disk: one safetensors file and a JSON description.

`model.safetensors` holds the packed weights as they are, frozen norms, biases and learnt positions
as float16, experts and routers as float16 or int8 (`SAMLConfig.expert_format`). What can be
computed (Whisper's encoder positions, sinusoids) is not stored. `saml.json` holds the
configurations and, by path, the formats of layers that have one of their own, of a table with
`FinerRows` as `{"format": f, "finer_rows": n}`; a list of `{"rows": n, "format": f}` is kept for
embeddings whose rows have several formats, which this version refuses. Tokeniser and feature
extractor are saved beside them by transformers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig

from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError, one_line
from saml_kernels.files import atomic_path
from saml_models.compress.apply import apply_saml
from saml_models.compress.layers import (
    ATTENTION_PROJECTIONS,
    Compression,
    compression_of,
    is_margin,
)
from saml_models.compress.packing import pack_experts, unpack_expert
from saml_models.models.interface import QUANTISED_MARGIN, SpeechModel
from saml_models.models.registry import bind, kind_named
from saml_models.runtime.devices import on_device
from saml_models.runtime.tensors import read_tensors, write_tensors

__all__ = ["load_saml", "save_saml"]

# Of the description: 2 where layers have formats of their own, 3 where a table has finer rows.
VERSION, MIXED_VERSION, FINER_VERSION = 1, 2, 3

WEIGHTS, DESCRIPTION = "model.safetensors", "saml.json"


def save_saml(model: Any, processor: Any, folder: str | Path) -> int:
    """Save a model that `apply_saml` treated; experts are rounded in place to their stored form.

    Returns:
        Bytes on disk of the weights and their description (the tokeniser's files not counted).

    Raises:
        SAMLError: the model has no SAML layers, speaks with a pruned profile or with one of gates,
            or the folder cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile puts that before every name
    if not hasattr(model, "config"):
        raise SAMLError(f"{type(model).__name__}: stays in its own files; save a profile instead")
    target = Path(folder)
    saml = compression_of(model)
    saml.check_own_experts()
    saml.round_experts()
    tensors = _stored_form(model, type(bind(model, processor)))
    formats = saml.formats()
    description = {
        "saml_version": _version(saml),
        "saml": saml.config.to_dict(),
        "short_windows": saml.short_windows,
        "margin": saml.margin,
        "model": _plain(model.config.to_diff_dict()),
        "generation": model.generation_config.to_diff_dict(),
        "weight_hash": saml.weight_hash(),
        **({"formats": formats} if formats else {}),
    }
    if saml.calibration is not None:
        description["calibration"] = saml.calibration
    write_tensors(target / WEIGHTS, tensors, {"format": "pt"})
    with atomic_path(target / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(description, indent=1, default=str), encoding="utf-8")
    processor.save_pretrained(target)
    return sum((target / name).stat().st_size for name in (WEIGHTS, DESCRIPTION))


def _version(saml: Compression) -> int:
    """The oldest that holds all of the model."""
    if saml.finer:
        return FINER_VERSION
    return MIXED_VERSION if saml.formats() else VERSION


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Without what `save_pretrained` says of the layers: `saml.json` has its own."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _stored_form(model: nn.Module, kind: type[SpeechModel]) -> dict[str, Tensor]:
    saml = compression_of(model)
    experts = saml.experts()
    tensors = pack_experts(experts, saml.config.expert_format)
    inside_weight = tuple(f"{name}." for name in saml.weights)
    for name, value in model.state_dict().items():
        if name in experts or value.numel() == 0:
            continue
        if name.startswith(inside_weight) or not value.is_floating_point():
            tensors[name] = value
        elif not _is_computed(kind, name, value):
            tensors[name] = value.to(torch.float16)
    return tensors


def _is_computed(kind: type[SpeechModel], name: str, value: Tensor) -> bool:
    """Whether these are the values that loading will compute."""
    compute = kind.computed(name)
    return compute is not None and torch.equal(value.float().cpu(), compute(value.shape))


def load_saml(folder: str | Path, device: Any = None) -> tuple[Any, Any]:
    """Load what `save_saml` wrote; the logits are those of the saved model, bit for bit.

    Raises:
        SAMLError: a file is missing or damaged, tensors do not fit the description, or the device
            is not there.
    """
    source = Path(folder)
    stored, _ = read_tensors(source / WEIGHTS)
    try:
        description = json.loads((source / DESCRIPTION).read_text(encoding="utf-8"))
        _check_version(description.get("saml_version"), source)
        config = _configuration(description["saml"], source)
        formats = dict(description.get("formats", {}))
        kind = kind_named(description["model"]["model_type"])
        model_config = kind.config_class.from_dict(description["model"])
        generation = GenerationConfig.from_dict(description["generation"])
        _check_size(kind, model_config, config, stored, source)
        # No memory and no random numbers: every tensor is in the file, but for a few that are made.
        with init_empty_weights(include_buffers=False):
            model: Any = kind.network_class(model_config)
        model.tie_weights()
    except SAMLError:
        raise
    except Exception as error:  # whatever transformers makes of values it does not expect
        reason = one_line(error)
        raise SAMLError(f"{source}: cannot be loaded ({reason}); copy it again") from error
    model.eval()
    # LoftQ's singular vectors would be overwritten by the stored experts: do not compute them.
    try:
        apply_saml(model, replace(config, expert_init="lora"), formats=formats)
    except SAMLError as error:
        raise SAMLError(f"{source / DESCRIPTION}: {error}") from error
    model._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    saml: Any = model.saml
    saml.config = config
    saml.short_windows = description.get("short_windows") is True
    saml.margin = _margin(description, source)
    if isinstance(description.get("calibration"), dict):
        saml.calibration = description["calibration"]
    model.generation_config = generation
    _fill(model, kind, stored, source)
    if saml.weight_hash() != description.get("weight_hash"):
        raise SAMLError(f"{source / WEIGHTS}: does not match its description; copy it again")
    try:
        processor = kind.load_processor(source)
    except SAMLError:
        raise
    except Exception as error:  # transformers and tokenizers raise a dozen kinds
        raise SAMLError(f"{source}: the tokeniser's files are damaged; copy them again") from error
    return on_device(model, device), processor


def _check_version(version: Any, source: Path) -> None:
    if type(version) is not int or version < 1:
        raise SAMLError(
            f"{source / DESCRIPTION}: saml_version {version!r}; expected a number: copy it again"
        )
    if version > FINER_VERSION:
        raise SAMLError(
            f"{source / DESCRIPTION}: saml_version {version}, of a newer saml-kernels; this one "
            f"reads up to {FINER_VERSION}: upgrade it"
        )


def _margin(description: dict[str, Any], source: Path) -> float | None:
    """What follows a clip; files of earlier versions do not say it."""
    margin: float | None = description.get("margin", QUANTISED_MARGIN)
    if not is_margin(margin):
        raise SAMLError(f"{source / DESCRIPTION}: margin={margin!r}; expected seconds or null")
    return margin


def _configuration(values: dict[str, Any], source: Path) -> SAMLConfig:
    try:
        return SAMLConfig.from_dict(values)
    except SAMLError as error:
        raise SAMLError(f"{source / DESCRIPTION}: {error}") from error


def _check_size(
    kind: type[SpeechModel], config: Any, saml: SAMLConfig, stored: dict[str, Tensor], source: Path
) -> None:
    """A description that asks for more than the file holds is refused before memory is taken."""
    held = sum(t.numel() for t in stored.values())
    fits = kind.fits(config, len(stored))
    if fits:
        with torch.device("meta"):
            skeleton = kind.network_class(config)
        parameters = skeleton.named_parameters()
        asked = sum(p.numel() for n, p in parameters if kind.computed(n) is None)
        widths = sum(
            m.in_features + m.out_features
            for n, m in skeleton.named_modules()
            if isinstance(m, nn.Linear) and n.endswith(ATTENTION_PROJECTIONS)
        )
        experts = saml.num_experts * saml.rank * widths
        # Two 4-bit codes are one stored element.
        fits = asked <= 2 * held and experts <= held
    if not fits:
        raise SAMLError(
            f"{source / DESCRIPTION}: asks for more weights than {WEIGHTS} holds; copy both again"
        )


@torch.no_grad()
def _fill(
    model: nn.Module, kind: type[SpeechModel], stored: dict[str, Tensor], source: Path
) -> None:
    experts = compression_of(model).experts()
    try:
        for name, parameter in experts.items():
            parameter.copy_(unpack_expert(stored, name, parameter.shape))
    except SAMLError as error:
        raise SAMLError(f"{source / WEIGHTS}: {error}") from error
    state = {n: v for n, v in model.state_dict().items() if v.numel() and n not in experts}
    for name, value in state.items():
        compute = kind.computed(name)
        if name in stored:
            tensor = stored[name]
        elif compute is not None:
            tensor = compute(value.shape)
        else:
            raise SAMLError(f"{source / WEIGHTS}: {name} is missing")
        if tensor.shape != value.shape:
            raise SAMLError(
                f"{source / WEIGHTS}: {name} has shape {tuple(tensor.shape)}; expected "
                f"{tuple(value.shape)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SAMLError(f"{source / WEIGHTS}: {name} holds NaN or infinity")
        if tensor.dtype != value.dtype and not (
            tensor.is_floating_point() and value.is_floating_point()
        ):
            raise SAMLError(f"{source / WEIGHTS}: {name} is {tensor.dtype}, not {value.dtype}")
        value.copy_(tensor)
    compression_of(model).check_finer(f"{source / WEIGHTS}: ")
