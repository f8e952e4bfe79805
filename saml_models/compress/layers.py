"""What a compressed model consists of: its experts, routers and low-bit tensors, by name."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saml_kernels.config import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_kernels.layers.context import Routing
from saml_kernels.layers.linear import SAMLLinear
from saml_kernels.layers.routers import Router
from saml_kernels.quantization.tensor import QuantizedTensor
from saml_models.compress.packing import pack_experts, tensors_hash, unpack_expert

__all__ = [
    "can_mix",
    "check_whole",
    "config_of",
    "expert_parameters",
    "experts_hash",
    "kept_experts",
    "put",
    "round_experts",
    "routed_layers",
    "routers_of",
    "routing_of",
    "weight_hash",
]


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


# Whisper's, Canary's and ESPnet's names; a block has four of them.
ATTENTION_PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "out_proj", "o_proj"),
    *("linear_q", "linear_k", "linear_v", "linear_out"),
)

# These project positions, of which no voice has its own: low bits, but no experts.
POSITION_PROJECTIONS = ("relative_k_proj", "linear_pos")


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The experts and routers by name: what training changes and a profile holds."""
    found = {}
    for name, parameter in model.named_parameters():
        layer = name.rsplit(".", 1)[-1]
        of_router = ".router." in f".{name}" or name.startswith("saml_routers.")
        if (of_router or layer in ("lora_a", "lora_b")) and parameter.numel():
            found[name] = parameter
    return found


def routed_layers(model: nn.Module) -> dict[str, SAMLLinear]:
    """The layers that have a router of their own, by name, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SAMLLinear) and module.router is not None
    }


def routers_of(model: nn.Module) -> dict[str, Router]:
    """The routers of `routed_layers`, by the layers' names."""
    found = {name: layer.router for name, layer in routed_layers(model).items()}
    return {name: router for name, router in found.items() if router is not None}


def config_of(model: nn.Module) -> SAMLConfig:
    """The configuration that `apply_saml` was given.

    Raises:
        SAMLError: the model has no SAML layers.
    """
    config = getattr(model, "saml_config", None)
    if not isinstance(config, SAMLConfig):
        raise SAMLError(f"{type(model).__name__}: has no SAML layers; call apply_saml first")
    return config


def routing_of(model: nn.Module) -> Routing:
    """The routing state that the model's layers share.

    Raises:
        SAMLError: the model has no SAML layers.
    """
    routing = getattr(model, "saml_routing", None)
    if not isinstance(routing, Routing):
        raise SAMLError(f"{type(model).__name__}: has no SAML layers; call apply_saml first")
    return routing


def quantised_tensors(model: nn.Module) -> dict[str, QuantizedTensor]:
    """The frozen low-bit weights by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedTensor)}


def check_whole(model: nn.Module) -> None:
    """Refuse a model that speaks with a pruned profile.

    Raises:
        SAMLError: it does.
    """
    count = config_of(model).num_experts
    if any(len(layer.lora_a) != count for layer in routed_layers(model).values()):
        raise SAMLError("the model speaks with a pruned profile; load it anew for a new one")


@contextmanager
def kept_experts(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to experts and gates, they are as before when it ends."""
    before = [(p, p.detach().clone()) for p in expert_parameters(model).values()]
    offsets = [(router, router.offset) for router in routers_of(model).values()]
    short = getattr(model, "saml_short_windows", False)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                put(parameter, value)
        for router, offset in offsets:
            router.offset = offset
        model.saml_short_windows = short  # type: ignore[assignment]


def can_mix(model: nn.Module) -> bool:
    """Whether rows of one batch can have different speakers: not where layers share routers."""
    return hasattr(model, "saml_config") and config_of(model).router != "shared"


def put(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a value into a parameter, of which pruning may leave fewer experts."""
    if parameter.shape == value.shape:
        parameter.copy_(value)
    else:
        # A tensor made in inference mode could never be trained again.
        with torch.inference_mode(False):
            parameter.data = value.to(parameter.device, parameter.dtype).clone()
