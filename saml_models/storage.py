"""A quantised model with experts on disk: one safetensors file and a JSON description.

`model.safetensors` holds the packed weights as they are, frozen norms, biases and learnt positions
as float16, experts and routers as float16 or int8 (`SAMLConfig.expert_format`). What the family can
compute (Whisper's encoder positions, sinusoids) is not stored. `saml.json` holds the
configurations. Tokeniser and feature extractor are saved beside them by transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn
from transformers import GenerationConfig

from saml_kernels import SAMLConfig, quantize
from saml_kernels.errors import SAMLError
from saml_kernels.quant import QuantizedTensor
from saml_models.devices import on_device
from saml_models.families import Family, family_named, family_of
from saml_models.files import atomic_path
from saml_models.surgery import (
    ATTENTION_PROJECTIONS,
    apply_saml,
    config_of,
    expert_parameters,
    quantised_tensors,
)

__all__ = [
    "experts_hash",
    "load_saml",
    "pack_experts",
    "read_tensors",
    "round_experts",
    "save_saml",
    "tensors_hash",
    "weight_hash",
]

VERSION = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "saml.json"
EXPERT_BLOCK = 128
# Parts of an int8 tensor in a file: `<name>` + suffix.
_CODES, _SCALES = ".int8", ".scale"


def pack_experts(
    parameters: dict[str, nn.Parameter] | dict[str, Tensor], expert_format: str
) -> dict[str, Tensor]:
    """Experts and routers as they are stored: float16, or int8 with one scale in 128 elements."""
    packed: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        value = parameter.detach().float().cpu()
        if not torch.isfinite(value).all():
            raise SAMLError(f"{name}: holds NaN or infinity; training diverged, lower the rate")
        if expert_format == "float16":
            packed[name] = value.to(torch.float16)
            continue
        quantised = quantize(value, "int8", EXPERT_BLOCK, double_quant=False)
        packed[name + _CODES] = quantised.codes
        packed[name + _SCALES] = quantised.absmax
    return packed


def unpack_expert(stored: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """One expert tensor from its stored form, float32.

    Raises:
        SAMLError: it is missing, holds NaN or infinity, or its size or dtype is not what `shape`
            asks for.
    """
    value = stored.get(name)
    if value is not None:
        if value.dtype != torch.float16 or value.shape != shape:
            raise SAMLError(
                f"{name}: {value.dtype} {tuple(value.shape)} in the file; expected float16 "
                f"{tuple(shape)}: made for another model or configuration"
            )
        expert = value.float()
    else:
        expert = _unpack_int8(stored, name, shape)
    if not torch.isfinite(expert).all():
        raise SAMLError(f"{name}: holds NaN or infinity; the file is damaged")
    return expert


def _unpack_int8(stored: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    codes, scales = stored.get(name + _CODES), stored.get(name + _SCALES)
    if codes is None or scales is None:
        raise SAMLError(f"{name}: missing from the file: made for another model or configuration")
    blocks = -(-shape.numel() // EXPERT_BLOCK)
    fits = codes.dtype == torch.int8 and scales.dtype == torch.float32
    if not fits or codes.shape != (shape.numel(),) or scales.shape != (blocks,):
        raise SAMLError(
            f"{name}: {codes.dtype} {tuple(codes.shape)} and {scales.dtype} {tuple(scales.shape)} "
            f"in the file; expected {shape.numel()} int8 codes and {blocks} float32 scales: made "
            "for another model or configuration"
        )
    return QuantizedTensor.from_parts(
        codes, scales, None, None, list(shape), "int8", EXPERT_BLOCK
    ).dequantize()


@torch.no_grad()
def round_experts(model: nn.Module) -> None:
    """Round experts and routers in place to what the disk holds, so that saving loses nothing."""
    parameters = expert_parameters(model)
    stored = pack_experts(parameters, config_of(model).expert_format)
    for name, parameter in parameters.items():
        parameter.copy_(unpack_expert(stored, name, parameter.shape))


def weight_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the frozen low-bit weights: the identity of a base model.

    Computed once and again after a weight has changed or moved.
    """
    weights = sorted(quantised_tensors(model).items())
    parts = [part for _, tensor in weights for part in (tensor.codes, tensor.absmax)]

    def compute() -> str:
        digest = hashlib.sha256()
        for name, tensor in weights:
            digest.update(f"{name} {tensor.format} {tuple(tensor.shape)}".encode())
            for part in (tensor.codes, tensor.absmax):
                digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    return _remembered(model, "saml_weight_hash", parts, compute)


def experts_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the experts and routers that are in `model` now, as they are stored."""
    experts, config = expert_parameters(model), config_of(model)

    def compute() -> str:
        return tensors_hash(pack_experts(experts, config.expert_format))

    return _remembered(model, "saml_experts_hash", list(experts.values()), compute)


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Found:
    """What was found for these very tensors; a copy of the model finds it anew.

    Its references are weak, so that old weights can be freed.
    """

    def __init__(self, tensors: list[Tensor], found: str) -> None:
        self.state = [(t.data_ptr(), t._version) for t in tensors]
        self.tensors = [weakref.ref(t) for t in tensors]
        self.found = found

    def is_of(self, tensors: list[Tensor]) -> bool:
        """Whether none was replaced or written to since."""
        alive = [reference() for reference in self.tensors]
        return self.state == [(t.data_ptr(), t._version) for t in tensors] and all(
            a is t for a, t in zip(alive, tensors, strict=True)
        )

    def __reduce__(self) -> Any:
        return type(None), ()


def _remembered(
    model: nn.Module, name: str, tensors: list[Tensor], compute: Callable[[], str]
) -> str:
    """What `compute` found for these tensors, unless they have changed since."""
    if any(t.is_inference() for t in tensors):
        return compute()  # nobody counts what is written to those
    before = getattr(model, name, None)
    if isinstance(before, _Found) and before.is_of(tensors):
        return before.found
    found = compute()
    # A plain attribute: no part of the module's state.
    object.__setattr__(model, name, _Found(tensors, found))
    return found


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    # Through Python's own write, so that a full disk is an OSError with its reason.
    data = serialise({n: t.contiguous().cpu() for n, t in tensors.items()}, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        SAMLError: the file is missing, damaged, or not safetensors.
    """
    if not Path(path).is_file():
        raise SAMLError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise SAMLError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def save_saml(model: Any, processor: Any, folder: str | Path) -> int:
    """Save a model that `apply_saml` treated; experts are rounded in place to their stored form.

    Returns:
        Bytes on disk of the weights and their description (the tokeniser's files not counted).

    Raises:
        SAMLError: the model has no SAML layers, or the folder cannot be written.
    """
    if not hasattr(model, "config"):
        raise SAMLError(f"{type(model).__name__}: stays in its own files; save a profile instead")
    target = Path(folder)
    round_experts(model)
    tensors = _stored_form(model, family_of(model))
    description = {
        "saml_version": VERSION,
        "saml": config_of(model).to_dict(),
        "short_windows": bool(getattr(model, "saml_short_windows", False)),
        "model": model.config.to_diff_dict(),
        "generation": model.generation_config.to_diff_dict(),
        "weight_hash": weight_hash(model),
    }
    calibration = getattr(model, "saml_calibration", None)
    if calibration is not None:
        description["calibration"] = calibration
    write_tensors(target / WEIGHTS, tensors, {"format": "pt"})
    with atomic_path(target / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(description, indent=1, default=str), encoding="utf-8")
    processor.save_pretrained(target)
    return sum((target / name).stat().st_size for name in (WEIGHTS, DESCRIPTION))


def _stored_form(model: nn.Module, family: Family) -> dict[str, Tensor]:
    experts = expert_parameters(model)
    tensors = pack_experts(experts, config_of(model).expert_format)
    inside_weight = tuple(f"{name}." for name in quantised_tensors(model))
    for name, value in model.state_dict().items():
        if name in experts or value.numel() == 0:
            continue
        if name.startswith(inside_weight) or not value.is_floating_point():
            tensors[name] = value
        elif not _is_computed(family, name, value):
            tensors[name] = value.to(torch.float16)
    return tensors


def _is_computed(family: Family, name: str, value: Tensor) -> bool:
    """Whether these are the values that loading will compute."""
    return family.is_computed(name) and torch.equal(
        value.float().cpu(), family.compute(value.shape)
    )


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
        config = _configuration(description["saml"], source)
        family = family_named(description["model"]["model_type"])
        model_config = family.config_class.from_dict(description["model"])
        generation = GenerationConfig.from_dict(description["generation"])
        _check_size(family, model_config, config, stored, source)
        # No memory and no random numbers: every tensor is in the file, but for a few that are made.
        with init_empty_weights(include_buffers=False):
            model: Any = family.model_class(model_config)
        model.tie_weights()
    except SAMLError:
        raise
    except Exception as error:  # whatever transformers makes of values it does not expect
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SAMLError(f"{source}: cannot be loaded ({reason}); copy it again") from error
    model.eval()
    # LoftQ's singular vectors would be overwritten by the stored experts: do not compute them.
    apply_saml(model, replace(config, expert_init="lora"))
    model._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    model.saml_config = config
    model.saml_short_windows = description.get("short_windows") is True
    model.generation_config = generation
    if isinstance(description.get("calibration"), dict):
        model.saml_calibration = description["calibration"]
    _fill(model, family, stored, source)
    if weight_hash(model) != description.get("weight_hash"):
        raise SAMLError(f"{source / WEIGHTS}: does not match its description; copy it again")
    try:
        processor = family.load_processor(source)
    except Exception as error:  # transformers and tokenizers raise a dozen kinds
        raise SAMLError(f"{source}: the tokeniser's files are damaged; copy them again") from error
    return on_device(model, device), processor


def _configuration(values: dict[str, Any], source: Path) -> SAMLConfig:
    try:
        return SAMLConfig.from_dict(values)
    except SAMLError as error:
        raise SAMLError(f"{source / DESCRIPTION}: {error}") from error


def _check_size(
    family: Family, config: Any, saml: SAMLConfig, stored: dict[str, Tensor], source: Path
) -> None:
    """A description that asks for more than the file holds is refused before memory is taken."""
    held = sum(t.numel() for t in stored.values())
    layers, positions = family.extent(config)
    fits = layers <= len(stored) and positions <= 2**16
    if fits:
        with torch.device("meta"):
            skeleton = family.model_class(config)
        asked = sum(p.numel() for n, p in skeleton.named_parameters() if not family.is_computed(n))
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
def _fill(model: nn.Module, family: Family, stored: dict[str, Tensor], source: Path) -> None:
    experts = expert_parameters(model)
    try:
        for name, parameter in experts.items():
            parameter.copy_(unpack_expert(stored, name, parameter.shape))
    except SAMLError as error:
        raise SAMLError(f"{source / WEIGHTS}: {error}") from error
    state = {n: v for n, v in model.state_dict().items() if v.numel() and n not in experts}
    for name, value in state.items():
        if name in stored:
            found = stored[name]
        elif family.is_computed(name):
            found = family.compute(value.shape)
        else:
            raise SAMLError(f"{source / WEIGHTS}: {name} is missing")
        if found.shape != value.shape:
            raise SAMLError(
                f"{source / WEIGHTS}: {name} has shape {tuple(found.shape)}; expected "
                f"{tuple(value.shape)}"
            )
        if found.is_floating_point() and not torch.isfinite(found).all():
            raise SAMLError(f"{source / WEIGHTS}: {name} holds NaN or infinity")
        if found.dtype != value.dtype and not (
            found.is_floating_point() and value.is_floating_point()
        ):
            raise SAMLError(f"{source / WEIGHTS}: {name} is {found.dtype}, not {value.dtype}")
        value.copy_(found)
