"""`SpeakerProfile`: what one speaker's adaptation learnt, in one small safetensors file.

There are two kinds. `experts` holds the speaker's own experts and routers, as
`packing.pack_experts` stores them; pruned, those that the speaker uses. `gates` holds nothing but
an offset [E] to each router's logits, a few hundred bytes, beside the experts of the model.

The header names the base model by the hash of its frozen weights, says how and when the profile was
made (counts and seconds, not the words), and carries a checksum of all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saml_kernels.errors import SAMLError
from saml_models.compress.layers import compression_of, put
from saml_models.compress.packing import pack_experts, tensors_hash, unpack_expert
from saml_models.runtime.tensors import read_tensors, write_tensors

__all__ = ["SpeakerProfile", "is_profile"]

FILE = "saml-speaker-profile"

VERSION = 2

KINDS = ("experts", "gates")

GATES = "gates"  # the tensor of a profile of that kind

EMBEDDING = "embedding"  # in the file, beside the tensors


@dataclass(frozen=True)
class SpeakerProfile:
    """What one speaker (or, as `pretrained`, many) taught a base model.

    Attributes:
        tensors: of kind "experts" as stored, by the names of `Compression.experts`; of kind
            "gates" one, float16 [layers, E], in the order of `Compression.layers`.
        weight_hash: SHA-256 of the base model's frozen weights.
        config: `SAMLConfig.to_dict()` of the model it fits.
        about: facts for people: speaker, date, method, utterances, seconds, losses, WER.
        kind: "experts" or "gates".
        beside: of kind "gates": the hash of the experts whose gates these are.
        kept: of a pruned profile: the experts that are left, by layer; a layer that is not named
            has them all.
        embedding: float16 [2, d], how the speaker sounds (`identify.embed`), or None.
    """

    tensors: dict[str, Tensor]
    weight_hash: str
    config: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    kind: Literal["experts", "gates"] = "experts"
    beside: str = ""
    kept: dict[str, list[int]] = field(default_factory=dict)
    embedding: Tensor | None = None
    _unpacked: dict[str, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, model: nn.Module, /, **about: Any) -> SpeakerProfile:
        """The experts that are in `model` now.

        Raises:
            SAMLError: the model speaks with a pruned profile.
        """
        saml = compression_of(model)
        saml.check_whole()
        tensors = pack_experts(saml.experts(), saml.config.expert_format)
        about.setdefault("short_windows", saml.short_windows)
        return cls(tensors, saml.weight_hash(), saml.config.to_dict(), about)

    @classmethod
    def of_gates(cls, model: nn.Module, /, **about: Any) -> SpeakerProfile:
        """The offsets that are in the routers of `model` now; those that are not there count as 0.

        Raises:
            SAMLError: the layers have no routers of their own.
        """
        saml = compression_of(model)
        if not saml.routers:
            raise SAMLError("gates: the layers have no router of their own; learn experts instead")
        rows = [
            torch.zeros(saml.config.num_experts)
            if offset is None
            else offset.detach().float().cpu()
            for offset in (router.offset for router in saml.routers.values())
        ]
        about.setdefault("short_windows", saml.short_windows)
        return cls(
            {GATES: torch.stack(rows).to(torch.float16)},
            saml.weight_hash(),
            saml.config.to_dict(),
            about,
            kind="gates",
            beside=saml.experts_hash(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the tensors: recorded with every transcript made with them."""
        return tensors_hash(self.tensors)

    @property
    def name(self) -> str:
        """The speaker's name, as the profile was made with."""
        return str(self.about.get("speaker", "?"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically.

        Raises:
            SAMLError: the file cannot be written.
        """
        header = {
            "kind": FILE,
            "version": VERSION,
            "profile": self.kind,
            "weight_hash": self.weight_hash,
            "config": self.config,
            "about": self.about,
            "beside": self.beside,
            "kept": self.kept,
        }
        stored = dict(self.tensors)
        if self.embedding is not None:
            stored[EMBEDDING] = self.embedding
        header["checksum"] = _checksum(stored, header)
        write_tensors(Path(path), stored, {"saml": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpeakerProfile:
        """Read a profile; nothing in the file is trusted before it is checked.

        Raises:
            SAMLError: missing, damaged, altered, or no profile.
        """
        tensors, metadata = read_tensors(path)
        try:
            header = json.loads(metadata.get("saml", "null"))
            if not isinstance(header, dict) or header.get("kind") != FILE:
                raise SAMLError(f"{path}: is no speaker profile; `saml adapt` makes one")
            if header["version"] not in (1, VERSION):
                raise SAMLError(f"{path}: profile version {header['version']}; expected {VERSION}")
            checksum, kind = header.pop("checksum"), header.get("profile", "experts")
            # Version 1 knew experts only, and its checksum left the notes out.
            notes = header if header["version"] == VERSION else None
            whole = checksum == _checksum(tensors, notes) and kind in KINDS
            kept = {str(k): [int(e) for e in v] for k, v in header.get("kept", {}).items()}
            profile = cls(
                {name: t for name, t in tensors.items() if name != EMBEDDING},
                str(header["weight_hash"]),
                dict(header["config"]),
                dict(header["about"]),
                kind,
                str(header.get("beside", "")),
                kept,
                tensors.get(EMBEDDING),
            )
        except (
            ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError
        ) as error:  # fmt: skip
            if isinstance(error, SAMLError):
                raise
            raise SAMLError(f"{path}: the profile's header is damaged ({error})") from error
        if not whole:
            raise SAMLError(f"{path}: checksum does not match; the file was altered or damaged")
        sound = profile.embedding
        if sound is not None and not (
            sound.is_floating_point() and sound.dim() == 2 and torch.isfinite(sound).all()
        ):
            raise SAMLError(f"{path}: its embedding is no matrix of finite numbers")
        return profile

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this profile was not made for.

        Raises:
            SAMLError: other base weights, or other experts.
        """
        saml = compression_of(model)
        ours = saml.config
        differing = [
            f"{key}={self.config.get(key)!r} (model: {value!r})"
            for key, value in ours.to_dict().items()
            if key not in ("dropout", "balance", "expert_init") and self.config.get(key) != value
        ]
        if differing:
            raise SAMLError(f"profile: made for another configuration: {', '.join(differing)}")
        if self.weight_hash != saml.weight_hash():
            raise SAMLError(
                "profile: made for another model (its base weights have another hash); load the "
                f"model it names: {self.about.get('model', 'unknown')}; if this is it, rounded "
                "otherwise by another version, make the profile anew (saml adapt, saml pretrain)"
            )
        if self.kind == "gates" and self.beside != saml.experts_hash():
            raise SAMLError(
                "profile: its gates belong to other experts than the model's; start from those "
                "that it was made with"
            )

    def experts(self, model: nn.Module) -> dict[str, Tensor]:
        """Float32 experts and routers by parameter name, of the shapes of those that are kept.

        They are unpacked once: the caller must not write into them.

        Raises:
            SAMLError: they do not fit the model, or are damaged.
        """
        if self._unpacked:
            return self._unpacked
        saml = compression_of(model)
        count, unpacked = saml.config.num_experts, {}
        for name, parameter in saml.experts().items():
            shape, layer = parameter.shape, _layer(name)
            if layer != name:  # not the routers that layers share
                kept = self.kept.get(layer, range(count))
                if not kept or len(set(kept)) != len(kept) or not set(kept) <= set(range(count)):
                    raise SAMLError(f"{layer}: cannot keep the experts {kept} out of {count}")
                shape = torch.Size([len(kept), *shape[1:]])
            unpacked[name] = unpack_expert(self.tensors, name, shape)
        self._unpacked.update(unpacked)
        return unpacked

    def offsets(self, model: nn.Module) -> dict[str, Tensor]:
        """Float32 offset [E] of each routed layer, by its name.

        Raises:
            SAMLError: they do not fit the model, or are damaged.
        """
        saml = compression_of(model)
        shape = torch.Size([len(saml.layers), saml.config.num_experts])
        return dict(zip(saml.layers, unpack_expert(self.tensors, GATES, shape), strict=True))

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Let `model` speak with this profile; the base weights are not touched.

        Raises:
            SAMLError: the profile was made for another model.
        """
        self.check(model)
        saml = compression_of(model)
        if self.kind == "gates":
            offsets = self.offsets(model)
            for name, router in saml.routers.items():
                router.offset = offsets[name].to(router.weight.device)
        else:
            values = self.experts(model)
            for name, parameter in saml.experts().items():
                put(parameter, values[name])
            for router in saml.routers.values():
                router.offset = None
        saml.short_windows = bool(self.about.get("short_windows"))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block `model` speaks with this profile; its own experts come back after."""
        self.check(model)
        with compression_of(model).snapshot():
            self.apply(model)
            yield


def is_profile(path: Path, hash: str | None = None) -> bool:
    """Whether a file is a profile, undamaged, and the one with this hash where it is given."""
    try:
        profile = SpeakerProfile.load(path)
    except SAMLError:
        return False
    return hash is None or profile.hash == hash


def _layer(parameter: str) -> str:
    """The layer that a parameter of `Compression.experts` belongs to."""
    return re.sub(r"\.(lora_[ab]|router\.weight)$", "", parameter)


def _checksum(tensors: dict[str, Tensor], notes: dict[str, Any] | None) -> str:
    """SHA-256 (hex) of the tensors and of what is said about them."""
    if notes is None:
        return tensors_hash(tensors)
    text = json.dumps(notes, sort_keys=True)
    return hashlib.sha256(f"{tensors_hash(tensors)} {text}".encode()).hexdigest()
