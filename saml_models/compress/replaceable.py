"""Which layers of a model can be replaced, and why the others stay as they are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from saml_kernels.errors import SAMLError

__all__ = ["LAYERS", "Place", "check_shapes", "in_full_precision", "places_of", "storage", "tie"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Place:
    """Where a layer is registered; one that is registered twice has two places.

    Attributes:
        parent, name: `layer` is `parent.name`.
        path: in the model.
    """

    parent: nn.Module
    name: str
    path: str
    layer: Any


def storage(tensor: Tensor) -> int:
    """The same number for tensors that share their memory; on the meta device, for the same one."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr()


def tie(layer: Any) -> int:
    """The same number for layers that share their weight."""
    # A parametrised weight is made anew whenever it is asked for.
    return id(layer) if is_parametrized(layer) else storage(layer.weight)


def check_shapes(model: nn.Module) -> None:
    """Refuse what cannot be looked at.

    Raises:
        SAMLError: it has PEFT adapters, or parameters that get their shape at the first forward.
    """
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):
            raise SAMLError(f"{name}: has a PEFT adapter; merge it first (merge_and_unload)")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise SAMLError(f"{name}: has no shape yet; run the model once first")


def places_of(model: nn.Module) -> tuple[list[Place], dict[nn.Module, str]]:
    """The places of all layers that can be replaced, and why others of these kinds cannot be."""
    found = [
        Place(parent, name, f"{path}.{name}".lstrip("."), layer)
        for path, parent in model.named_modules()
        for name, layer in parent._modules.items()
        if isinstance(layer, LAYERS)
    ]
    held = _held_elsewhere(model)
    reasons: dict[nn.Module, str] = {}
    for place in found:
        reason = "held" if place.layer in held else _why_kept(place.name, place.layer)
        if reason is not None:
            reasons.setdefault(place.layer, reason)
    layers = {place.layer for place in found} - reasons.keys()
    staying = {
        storage(parameter)
        for module in model.modules()
        if module not in layers
        for parameter in module.parameters(recurse=False)
        if parameter.numel()
    }
    reasons |= {layer: "shared" for layer in layers if tie(layer) in staying}
    return [place for place in found if place.layer not in reasons], reasons


def _why_kept(name: str, layer: Any) -> str | None:
    if isinstance(layer, nn.Embedding) and "position" in name:  # sinusoids, or learnt: small
        return "positions"
    # A subclass has its own forward, or readers of its own: attention's out_proj is such a one.
    kind = type_before_parametrizations(layer)
    if kind not in LAYERS:
        return kind.__name__
    weight = layer.weight
    if not weight.is_floating_point():
        return f"{weight.dtype} weight"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"{type(weight).__name__} weight"
    if not weight.numel():
        return "empty"
    # A hook may set the weight, as torch's older weight_norm does; a patched forward reads it.
    if "forward" in vars(layer) or any(getattr(layer, hooks) for hooks in HOOKS):
        return "hooks"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm"
    groups = getattr(layer, "groups", None)
    if groups is None:
        return None
    return "depthwise" if groups == layer.in_channels else "grouped" if groups > 1 else None


def _held_elsewhere(model: nn.Module) -> set[nn.Module]:
    """Modules in plain attributes, lists, tuples and dicts: who has those keeps the old layer."""
    held: set[nn.Module] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            group = value.values() if isinstance(value, dict) else value
            many = isinstance(value, list | tuple | dict)
            held.update(m for m in (group if many else (value,)) if isinstance(m, nn.Module))
    return held


def in_full_precision(
    model: nn.Module, experts: Collection[str], reasons: dict[nn.Module, str]
) -> dict[str, str]:
    """The modules with matrices of their own, by name, and why they have them.

    Args:
        model: before or after the others were replaced.
        experts: names of parameters that do not count.
        reasons: for some; the others have their type's name.
    """
    kept = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.numel() and name not in experts:
            owner = name.rpartition(".")[0]
            module = model.get_submodule(owner)
            kind = type(module).__name__
            kept[owner or kind] = reasons.get(module, kind)
    return kept
