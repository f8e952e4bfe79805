"""Experts as PEFT LoRA adapters, and PEFT LoRA adapters as experts.

PEFT knows adapters but no router: an exported expert is what it adds at a gate of 1, and imported
ones start with equal shares, which `saml adapt` changes. Layout: a folder with
`adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.save_pretrained` writes it.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.files import atomic_path
from saml_kernels.layers.conv import SAMLPointwiseConv1d
from saml_models.compress.layers import compression_of, weight_hash
from saml_models.compress.packing import pack_experts
from saml_models.models.whisper.loading import OPENAI_NAMES
from saml_models.runtime.tensors import read_tensors, write_tensors
from saml_models.speakers.profile import SpeakerProfile

__all__ = ["adapter_config", "export_experts", "import_adapters"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
# Ways to start A and B that leave the base as it is. The others (pissa, olora, corda, lora_ga,
# loftq) take B A out of the base first, and mean nothing beside the whole base.
_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
# Options that leave the meaning of A and B as it is, once they are trained.
_HARMLESS = frozenset(
    (
        "peft_type", "peft_version", "task_type", "auto_mapping", "revision", "inference_mode",
        "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
        "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern",
        "layers_to_transform", "init_lora_weights", "eva_config", "corda_config",
        "lora_ga_config", "loftq_config", "megatron_core", "qalora_group_size",
        "fan_in_fan_out",  # of layers that are stored transposed, as A and B never are
        "ensure_weight_tying",  # of embeddings, which have no adapter here
        "runtime_config",
    )
)  # fmt: skip


def export_experts(
    profile: SpeakerProfile, model: nn.Module, folder: str | os.PathLike[str]
) -> list[Path]:
    """Write each expert as a PEFT adapter: folder/expert-0, expert-1, ...

    Args:
        profile: of kind "experts"; of a pruned one, a layer's e-th expert left goes to expert-e.
        model: with SAML layers, that the profile fits; gives names and shapes.
        folder: made where it is not there.

    Raises:
        SAMLError: the profile has no experts or does not fit, or a file cannot be written.
    """
    if profile.kind != "experts":
        raise SAMLError(f"{profile.name}: holds gates alone; expected experts to export")
    profile.check(model)
    values, config = profile.experts(model), compression_of(model).config
    layers, convolutions = compression_of(model).layers, _convolutions(model)
    if not layers:
        raise SAMLError(f"{profile.name}: its gates belong to one clip at a time; cannot export")
    written = []
    for expert in range(config.num_experts):
        tensors, modules = {}, []
        for name in layers:
            a, b = values[f"{name}.lora_a"], values[f"{name}.lora_b"]
            if expert >= len(a):
                continue
            module = convolutions.get(name, name)
            modules.append(module)
            for letter, value in (("A", a[expert]), ("B", b[expert])):
                shaped = value.unsqueeze(-1) if name in convolutions else value
                tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = shaped.contiguous()
        if not modules:
            continue
        target = Path(folder) / f"expert-{expert}"
        write_tensors(target / WEIGHTS, tensors, {"format": "pt"})
        settings = adapter_config(config, modules, str(profile.about.get("model", "")))
        with atomic_path(target / CONFIG) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
        written.append(target)
    return written


def adapter_config(config: SAMLConfig, modules: Sequence[str], base: str) -> dict[str, Any]:
    """What PEFT's LoraConfig reads for one expert over these modules."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def import_adapters(
    folders: Sequence[str | os.PathLike[str]],
    model: nn.Module,
    speaker: str,
) -> SpeakerProfile:
    """A profile whose experts are PEFT LoRA adapters, with equal shares.

    Args:
        folders: one for each expert.
        model: with SAML layers of any configuration, token routers and mix="sum"; gives names,
            shapes and the identity of the base. Layers that no adapter has get zeros.
        speaker: name for the profile.

    Returns:
        A profile for the same base with as many experts as adapters, of the largest rank, stored
        in float16: `loading.profile_config` has its configuration.

    Raises:
        SAMLError: an adapter that is missing, damaged, no LoRA, one with options that change what
            it means or the base that it was trained on, one for other layers than the model's, or
            one that was made for another of OpenAI's models.
    """
    if not folders:
        raise SAMLError("import: no adapters; give at least one folder")
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    adapters = [_read(Path(folder), name) for folder in folders]
    rank = max(a.shape[0] for adapter in adapters for a, _ in adapter.values())
    layers, convolutions = compression_of(model).layers, _convolutions(model)
    names = {convolutions.get(path, path): path for path in layers}
    for folder, adapter in zip(folders, adapters, strict=True):
        for module, (a, b) in adapter.items():
            if module not in names:
                raise SAMLError(f"{folder}: adapts {module}, which the model has no experts for")
            layer = layers[names[module]]
            if a.shape[1] != layer.in_features or b.shape[0] != layer.out_features:
                raise SAMLError(
                    f"{folder}: {module} is {b.shape[0]} x {a.shape[1]}; expected "
                    f"{layer.out_features} x {layer.in_features}: made for another model"
                )
    experts: dict[str, Tensor] = {}
    for module, path in names.items():
        layer = layers[path]
        a = torch.zeros(len(adapters), rank, layer.in_features)
        b = torch.zeros(len(adapters), layer.out_features, rank)
        for e, adapter in enumerate(adapters):
            if module in adapter:
                own_a, own_b = adapter[module]
                a[e, : len(own_a)], b[e, :, : len(own_a)] = own_a, own_b
        experts[f"{path}.lora_a"], experts[f"{path}.lora_b"] = a, b
        experts[f"{path}.router.weight"] = torch.zeros(len(adapters), layer.in_features)
    ours = compression_of(model).config
    config = SAMLConfig(
        num_experts=len(adapters),
        rank=rank,
        alpha=float(rank),  # scale 1: each adapter's own is in its B
        format=ours.format,
        block_size=ours.block_size,
        double_quant=ours.double_quant,
        expert_init="lora",
        expert_format="float16",
    )
    return SpeakerProfile(
        pack_experts(experts, config.expert_format),
        weight_hash(model),
        config.to_dict(),
        {
            "speaker": speaker,
            "model": name,
            "method": f"{len(adapters)} PEFT LoRA adapters",
            "date": datetime.date.today().isoformat(),
            "short_windows": False,
        },
    )


def _convolutions(model: nn.Module) -> dict[str, str]:
    """Routed layers inside pointwise convolutions, and the names that those had."""
    return {
        f"{name}.linear": name
        for name, module in model.named_modules()
        if isinstance(module, SAMLPointwiseConv1d)
    }


def _read(folder: Path, base: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, K] and B [N, r] in float32 by module, the scale in B; `base` is the model's name."""
    settings = _settings(folder / CONFIG)
    _check_base(folder / CONFIG, settings, base)
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(folder / WEIGHTS)[0].items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            raise SAMLError(f"{folder / WEIGHTS}: holds {key}; expected lora_A and lora_B alone")
        flat = value.float().squeeze(-1) if value.dim() == 3 else value.float()
        if flat.dim() != 2 or not torch.isfinite(flat).all():
            raise SAMLError(f"{folder / WEIGHTS}: {key} is no matrix of finite numbers")
        found.setdefault(match[1], {})[match[2]] = flat
    adapters = {}
    for module, pair in found.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise SAMLError(f"{folder / WEIGHTS}: {module}: A and B do not fit each other")
        rank, scale = _rank_and_scale(folder / CONFIG, settings, module)
        if len(pair["A"]) != rank:
            raise SAMLError(
                f"{folder / WEIGHTS}: {module}: has rank {len(pair['A'])}; its configuration says "
                f"{rank}"
            )
        adapters[module] = (pair["A"], pair["B"] * scale)
        if any(not torch.isfinite(t.half()).all() for t in adapters[module]):
            raise SAMLError(f"{folder / WEIGHTS}: {module}: is too large for float16")
    if not adapters:
        raise SAMLError(f"{folder / WEIGHTS}: holds no LoRA")
    return adapters


def _settings(path: Path) -> dict[str, Any]:
    """The configuration, once nothing in it changes the meaning of A and B."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind, start = settings.get("peft_type"), settings.get("init_lora_weights", True)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SAMLError(f"{path}: not a PEFT adapter's configuration ({error})") from error
    bias = settings.pop("bias", "none")
    if kind != "LORA" or bias != "none":
        raise SAMLError(f"{path}: {kind} with bias={bias}; expected a plain LoRA")
    if str(start).lower() not in _STARTS:
        raise SAMLError(
            f"{path}: init_lora_weights={start!r} changes the base; save it again with PEFT's "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    for option, value in settings.items():
        if value and option not in _HARMLESS:
            raise SAMLError(f"{path}: uses {option}, which experts cannot express; merge it first")
    return settings


def _rank_and_scale(path: Path, settings: dict[str, Any], module: str) -> tuple[int, float]:
    """What PEFT gives this module: the first pattern that fits its name, else the default."""
    try:
        rank = int(_of_pattern(settings.get("rank_pattern"), module, settings["r"]))
        alpha = float(_of_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"]))
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"{module}: r {rank}, lora_alpha {alpha}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise SAMLError(f"{path}: not a PEFT adapter's configuration ({error})") from error
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_base(path: Path, settings: dict[str, Any], name: str) -> None:
    """Refuse an adapter of another of OpenAI's models; of other bases the names say nothing."""
    made_for = settings.get("base_model_name_or_path")
    theirs, ours = (OPENAI_NAMES.get(str(n), str(n)).lower() for n in (made_for, name))
    if theirs != ours and {theirs, ours} <= {n.lower() for n in OPENAI_NAMES.values()}:
        raise SAMLError(f"{path}: made for {made_for}; the model is {name}")
