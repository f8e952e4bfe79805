"""`Compression`: what a compressed model consists of. It is found once and held at `model.saml`."""

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
from saml_kernels.layers.context import BatchContext
from saml_kernels.layers.conv import SAMLPointwiseConv1d
from saml_kernels.layers.embedding import FinerRows
from saml_kernels.layers.linear import SAMLLinear
from saml_kernels.layers.routers import Router
from saml_kernels.quantization.tensor import QuantizedTensor
from saml_models.compress.packing import pack_experts, tensors_hash, unpack_expert

__all__ = [
    "Compression",
    "cast",
    "compression_of",
    "hash_of_weights",
    "is_margin",
    "model_hash",
    "parameters_hash",
    "quantised_tensors",
    "weight_hash",
]

# Whisper's, Canary's and ESPnet's names; a block has four of them.
ATTENTION_PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "out_proj", "o_proj"),
    *("linear_q", "linear_k", "linear_v", "linear_out"),
)

# These project positions, of which no voice has its own: low bits, but no experts.
POSITION_PROJECTIONS = ("relative_k_proj", "linear_pos")


class Compression:
    """What `apply_saml` made of a model, by the names of its modules.

    It holds modules, never their tensors, which training, pruning and `.to` replace. A copy of the
    model has a copy of it, of the copy's modules.

    Attributes:
        config: as `apply_saml` was given it.
        context: of the batch that runs now; all layers of the model share it.
        layers: the layers that have a router of their own, in the model's order.
        routers: their routers, by the layers' names.
        weights: the frozen low-bit weights.
        finer: what makes some rows of a table finer, by the table's path.
        short_windows: whether the experts know windows that end soon after a clip does.
        margin: seconds of silence after a clip for a model whose experts do not; None is Whisper's
            whole window.
        calibration: how the weights were rounded, where not plainly: `Calibration.about`.
    """

    def __init__(self, model: nn.Module, config: SAMLConfig, context: BatchContext) -> None:
        """Look through a model whose layers have been replaced."""
        self.config, self.context = config, context
        self.layers: dict[str, SAMLLinear] = {}
        self.routers: dict[str, Router] = {}
        self.weights: dict[str, QuantizedTensor] = quantised_tensors(model)
        for name, module in model.named_modules():
            if isinstance(module, SAMLLinear) and module.router is not None:
                self.layers[name], self.routers[name] = module, module.router
        modules = dict(model.named_modules())
        finer = ((n, m) for n, m in modules.items() if isinstance(m, FinerRows))
        self.finer = {name.removesuffix(".finer"): module for name, module in finer}
        inner = (f"{n}.linear" for n, m in modules.items() if isinstance(m, SAMLPointwiseConv1d))
        self._inner = frozenset(inner)
        self._experts: list[tuple[str, nn.Module, str]] = []
        for name, _ in model.named_parameters():
            place, _, own = name.rpartition(".")
            of_router = ".router." in f".{name}" or name.startswith("saml_routers.")
            if of_router or own in ("lora_a", "lora_b"):
                self._experts.append((name, modules[place], own))
        self.short_windows = False
        self.margin: float | None = None
        self.calibration: dict[str, Any] | None = None
        self._hashes: dict[str, _Remembered] = {}

    def experts(self) -> dict[str, nn.Parameter]:
        """The experts and routers by name: what training changes and a profile holds."""
        parameters = {name: getattr(module, own) for name, module, own in self._experts}
        return {name: parameter for name, parameter in parameters.items() if parameter.numel()}

    def formats(self) -> dict[str, Any]:
        """By their path in the model: layers that have not `config.format`, tables with finer rows.

        As `apply_saml` takes them.
        """
        formats: dict[str, Any] = {}
        for name, weight in self.weights.items():
            path = name.removesuffix(".weight")
            if weight.format != self.config.format and not path.endswith(".finer"):
                own = path.removesuffix(".linear") if path in self._inner else path
                formats[own] = weight.format
        for path, finer in self.finer.items():
            format = self.weights[f"{path}.weight"].format
            formats[path] = {"format": format, "finer_rows": len(finer.rows)}
        return formats

    @property
    def can_mix(self) -> bool:
        """Whether rows of one batch can have different speakers: not where layers share routers."""
        return self.config.router != "shared"

    def check_whole(self) -> None:
        """Refuse a model whose experts are those of a pruned profile.

        Raises:
            SAMLError: they are.
        """
        count = self.config.num_experts
        if any(len(layer.lora_a) != count for layer in self.layers.values()):
            raise SAMLError("the model speaks with a pruned profile; load it anew for a new one")

    def check_own_experts(self) -> None:
        """Refuse to save a model that speaks with a profile which no model's file can hold.

        Raises:
            SAMLError: the profile is pruned, or one of gates.
        """
        self.check_whole()
        if any(router.offset is not None for router in self.routers.values()):
            raise SAMLError(
                "the model speaks with a profile of gates, which are in no model's file; save the "
                "profile, and the model without it"
            )

    def check_finer(self, where: str = "") -> None:
        """Check finer rows that came from a file, of which `where` begins the message.

        Raises:
            SAMLError: they are no rising rows of their table.
        """
        for path, finer in self.finer.items():
            finer.check(self.weights[f"{path}.weight"], f"{where}{path}")

    @torch.no_grad()
    def round_experts(self) -> None:
        """Round experts and routers in place to what the disk holds: saving then loses nothing."""
        parameters = self.experts()
        stored = pack_experts(parameters, self.config.expert_format)
        for name, parameter in parameters.items():
            parameter.copy_(unpack_expert(stored, name, parameter.shape))

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Whatever the block does to experts and gates, they are as before when it ends."""
        before = [(p, p.detach().clone()) for p in self.experts().values()]
        offsets = [(router, router.offset) for router in self.routers.values()]
        short = self.short_windows
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in before:
                    put(parameter, value)
            for router, offset in offsets:
                router.offset = offset
            self.short_windows = short

    def weight_hash(self) -> str:
        """SHA-256 (hex) of the frozen low-bit weights: the identity of a base model.

        Computed once, and again after a weight has changed or moved.
        """
        parts = [part for tensor in self.weights.values() for part in (tensor.codes, tensor.absmax)]
        rows = {path: finer.rows for path, finer in self.finer.items()}
        parts += rows.values()
        return self._remembered("weights", parts, lambda: hash_of_weights(self.weights, rows))

    def experts_hash(self) -> str:
        """SHA-256 (hex) of the experts and routers that are in the model now, as stored."""
        experts = self.experts()
        return self._remembered(
            "experts",
            list(experts.values()),
            lambda: tensors_hash(pack_experts(experts, self.config.expert_format)),
        )

    def _remembered(self, name: str, tensors: list[Tensor], compute: Callable[[], str]) -> str:
        """What `compute` found for these tensors, unless they have changed since."""
        if any(t.is_inference() for t in tensors):
            return compute()  # nobody counts what is written to those
        before = self._hashes.get(name)
        if before is None or not before.is_of(tensors):
            before = self._hashes[name] = _Remembered(tensors, compute())
        return before.found

    def __getstate__(self) -> dict[str, Any]:
        """A copy computes the hashes of its own tensors."""
        return {**vars(self), "_hashes": {}}


class _Remembered:
    """What was computed for these very tensors; references are weak, so old ones can be freed."""

    def __init__(self, tensors: list[Tensor], result: str) -> None:
        self.state = [(t.data_ptr(), t._version) for t in tensors]
        self.tensors = [weakref.ref(t) for t in tensors]
        self.found = result

    def is_of(self, tensors: list[Tensor]) -> bool:
        """Whether none was replaced or written to since."""
        alive = [reference() for reference in self.tensors]
        return self.state == [(t.data_ptr(), t._version) for t in tensors] and all(
            a is t for a, t in zip(alive, tensors, strict=True)
        )


def compression_of(model: nn.Module) -> Compression:
    """`model.saml`.

    Raises:
        SAMLError: the model has no SAML layers.
    """
    saml = getattr(model, "saml", None)
    if not isinstance(saml, Compression):
        raise SAMLError(f"{type(model).__name__}: has no SAML layers; call apply_saml first")
    return saml


def is_margin(value: Any) -> bool:
    """Whether a value from a file can be a `Compression.margin`."""
    # Far below what overflows when it is counted in frames; NaN is in no interval.
    return value is None or (type(value) in (int, float) and 0 <= value <= 1e9)


def weight_hash(model: nn.Module) -> str:
    """`Compression.weight_hash`; of a model in full precision, the hash of nothing."""
    saml = getattr(model, "saml", None)
    return saml.weight_hash() if isinstance(saml, Compression) else hash_of_weights({})


def model_hash(model: nn.Module) -> str:
    """`Compression.weight_hash`; of a model in full precision, the hash of its parameters."""
    saml = getattr(model, "saml", None)
    if isinstance(saml, Compression):
        return saml.weight_hash()
    return parameters_hash(model)


def parameters_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the names, shapes and values of all parameters in float16."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().half().contiguous().numpy().data)
    return digest.hexdigest()


def quantised_tensors(model: nn.Module) -> dict[str, QuantizedTensor]:
    """The frozen low-bit weights by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedTensor)}


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """All of a model but experts and routers: the hash of their numbers is in profiles."""
    saml: Compression | None = getattr(model, "saml", None)
    own = [] if saml is None else [(p, p.data) for p in saml.experts().values()]
    model.to(dtype)
    for parameter, data in own:
        parameter.data = data


def put(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a value into a parameter, of which pruning may leave fewer experts."""
    if parameter.shape == value.shape:
        parameter.copy_(value)
    else:
        # A tensor made in inference mode could never be trained again.
        with torch.inference_mode(False):
            parameter.data = value.to(parameter.device, parameter.dtype).clone()


def hash_of_weights(
    weights: dict[str, QuantizedTensor], finer_rows: dict[str, Tensor] | None = None
) -> str:
    """SHA-256 (hex) of low-bit weights by their layers' names; see `Compression.weight_hash`.

    `finer_rows` are those of `FinerRows`, by the table's name.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.format} {tuple(tensor.shape)}".encode())
        for part in (tensor.codes, tensor.absmax):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    for name, rows in sorted((finer_rows or {}).items()):
        digest.update(f"{name} finer rows {len(rows)}".encode())
        digest.update(rows.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
