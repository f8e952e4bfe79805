"""`SpeakerProfile`: what one speaker's adaptation learnt, in one small safetensors file.

The tensors are the experts and routers as `storage.pack_experts` stores them. The header names the
base model by the hash of its frozen weights, says how and when the profile was made (counts and
seconds, not the words), and carries a checksum of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saml_kernels.errors import SAMLError
from saml_models.storage import (
    pack_experts,
    read_tensors,
    unpack_expert,
    weight_hash,
    write_tensors,
)
from saml_models.surgery import config_of, expert_parameters

__all__ = ["SpeakerProfile"]

KIND = "saml-speaker-profile"
VERSION = 1


@dataclass(frozen=True)
class SpeakerProfile:
    """Experts and routers of one speaker (or, as `pretrained`, of many) for one base model.

    Attributes:
        tensors: as stored; names are those of `surgery.expert_parameters`.
        weight_hash: SHA-256 of the base model's frozen weights.
        config: `SAMLConfig.to_dict()` of the model it fits.
        about: free facts for people: speaker, date, utterances, seconds, losses.
    """

    tensors: dict[str, Tensor]
    weight_hash: str
    config: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, /, **about: Any) -> SpeakerProfile:
        """The experts that are in `model` now."""
        config = config_of(model)
        tensors = pack_experts(expert_parameters(model), config.expert_format)
        about.setdefault("short_windows", bool(getattr(model, "saml_short_windows", False)))
        return cls(tensors, weight_hash(model), config.to_dict(), about)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the tensors: recorded with every transcript made with them."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically.

        Raises:
            SAMLError: the file cannot be written.
        """
        header = {
            "kind": KIND,
            "version": VERSION,
            "weight_hash": self.weight_hash,
            "config": self.config,
            "about": self.about,
            "checksum": self.hash,
        }
        write_tensors(Path(path), self.tensors, {"saml": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpeakerProfile:
        """Read a profile; nothing in the file is trusted before it is checked.

        Raises:
            SAMLError: missing, damaged, altered, or no profile.
        """
        tensors, metadata = read_tensors(path)
        try:
            header = json.loads(metadata.get("saml", "null"))
            if not isinstance(header, dict) or header.get("kind") != KIND:
                raise SAMLError(f"{path}: is no speaker profile; `saml adapt` makes one")
            if header["version"] != VERSION:
                raise SAMLError(f"{path}: profile version {header['version']}; expected {VERSION}")
            config, about = header["config"], header["about"]
            profile = cls(tensors, str(header["weight_hash"]), dict(config), dict(about))
            checksum = header["checksum"]
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, SAMLError):
                raise
            raise SAMLError(f"{path}: the profile's header is damaged ({error})") from error
        if profile.hash != checksum:
            raise SAMLError(f"{path}: checksum does not match; the file was altered or damaged")
        return profile

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this profile was not made for.

        Raises:
            SAMLError: other base weights, or other experts.
        """
        ours = config_of(model)
        differing = [
            f"{key}={self.config.get(key)!r} (model: {value!r})"
            for key, value in ours.to_dict().items()
            if key not in ("dropout", "balance", "expert_init") and self.config.get(key) != value
        ]
        if differing:
            raise SAMLError(f"profile: made for another configuration: {', '.join(differing)}")
        if self.weight_hash != weight_hash(model):
            raise SAMLError(
                "profile: made for another model (its base weights have another hash); load the "
                f"model it names: {self.about.get('model', 'unknown')}"
            )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Put these experts into `model` in place of its own; the base weights are not touched.

        Raises:
            SAMLError: the profile was made for another model.
        """
        self.check(model)
        parameters = expert_parameters(model)
        values = {n: unpack_expert(self.tensors, n, p.shape) for n, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
        model.saml_short_windows = bool(self.about.get("short_windows"))  # type: ignore[assignment]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block `model` speaks with this profile; its own experts come back after."""
        self.check(model)
        with kept_experts(model):
            self.apply(model)
            yield


@contextmanager
def kept_experts(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to the experts, they are as before when it ends."""
    parameters = expert_parameters(model)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    short = getattr(model, "saml_short_windows", False)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        model.saml_short_windows = short  # type: ignore[assignment]
