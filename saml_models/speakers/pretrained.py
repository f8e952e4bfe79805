"""Models by name or path: full precision as released, or with SAML layers ready to adapt."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_models.compress.apply import CompressionReport, apply_saml, unless_refused
from saml_models.compress.calibration import Calibration
from saml_models.compress.layers import compression_of
from saml_models.compress.loading import load_model
from saml_models.compress.shipped_rounding import shipped_rounding
from saml_models.models.interface import QUANTISED_MARGIN
from saml_models.speakers.profile import SpeakerProfile

__all__ = [
    "load_adaptable",
    "load_for_speakers",
    "make_adaptable",
    "pretrained_experts",
    "profile_config",
    "shipped_experts",
]

MOST = 8192  # ranks of all experts of a layer that a file may ask memory for


def load_adaptable(
    name_or_path: str | os.PathLike[str],
    config: SAMLConfig | None = None,
    experts: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """A model with SAML layers, starting from pretrained experts where there are some.

    Args:
        name_or_path: as for `load_model`; a saved SAML model keeps its layers and experts.
        config: of the layers; None takes that of the pretrained experts, else `SAMLConfig()`.
        experts: a profile file that `saml pretrain` made, or a name (see `pretrained_experts`);
            None takes those that ship with the package for this model, if no `config` asks for
            something else.
        device: None is the CPU.

    Raises:
        SAMLError: as `load_model` does, or the experts do not fit the model.
    """
    model, processor = load_model(name_or_path, device)
    name = os.fspath(name_or_path)
    if hasattr(model, "saml"):
        if experts is not None:
            _apply(pretrained_experts(name, experts), model, experts)
    else:
        make_adaptable(model, name, config, experts)
    return model, processor


def load_for_speakers(
    name_or_path: str | os.PathLike[str],
    profiles: Mapping[str, SpeakerProfile],
    device: str | torch.device | None = None,
    *,
    candidates: Sequence[SpeakerProfile] = (),
    experts: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """A model that can speak with these profiles, or plain where there are none.

    Args:
        name_or_path, device: as for `load_model`.
        profiles: by name or file; the first one's configuration is the model's, unless the experts
            that ship with the package have it too: those are then loaded, for gates and for clips
            of nobody.
        candidates: others, that need not fit; without `profiles` one of these says the
            configuration, one that was made with this model if there is one.
        experts: as for `load_adaptable`.

    Raises:
        SAMLError: as `load_model` does, or the profiles do not fit the model.
    """
    named = [p for p in candidates if p.about.get("model") == os.fspath(name_or_path)]
    first = next(iter([*profiles.values(), *named, *candidates]), None)
    if first is None and experts is None:
        return load_model(name_or_path, device)
    config = None
    if first is not None and experts is None:
        shipped = shipped_experts(os.fspath(name_or_path))
        config = profile_config(first)
        if shipped is not None and profile_config(shipped).to_dict() == config.to_dict():
            config = None
    model, processor = load_adaptable(name_or_path, config, experts, device)
    for name, profile in profiles.items():
        try:
            profile.check(model)
        except SAMLError as error:
            raise SAMLError(f"{name}: {error}") from error
    return model, processor


def make_adaptable(
    model: Any,
    name: str,
    config: SAMLConfig | None = None,
    experts: str | os.PathLike[str] | None = None,
    rounding: Callable[[SAMLConfig], Calibration] | None = None,
) -> CompressionReport:
    """Give a full-precision model SAML layers and pretrained experts, in place.

    Args:
        model: as released; `name` is what it was loaded by.
        name: finds the experts that ship with the package.
        config, experts: as for `load_adaptable`.
        rounding: of the weights, given the layers' configuration; None takes what ships for the
            model, and plain rounding where nothing does. The experts that ship were trained beside
            that: with another one, none are taken unless asked for.

    Raises:
        SAMLError: the model was treated before, or the experts do not fit it. The model is then as
            it was.
    """
    profile = None
    if experts is not None:
        profile = pretrained_experts(name, experts)
        _check_whole(profile, experts)
        if profile.kind == "gates":
            raise SAMLError(f"{experts}: is a profile of gates; start from experts")
    elif config is None:
        profile = shipped_experts(name)
    wanted = config or (SAMLConfig() if profile is None else profile_config(profile))
    if rounding is None:
        calibration = shipped_rounding(model, wanted)
    else:
        if experts is None:
            profile = None
        elif profile is not None:
            _check_shapes(profile, model, wanted, experts)
        calibration = rounding(wanted)
    if profile is None:
        report = apply_saml(model, wanted, calibration=calibration)
    else:
        # The experts are overwritten: LoftQ's singular vectors would be computed in vain.
        bare = replace(wanted, expert_init="lora")
        with unless_refused(model):  # rounded weights have the hash that decides
            report = apply_saml(model, bare, calibration=calibration)
            compression_of(model).config = wanted
            _apply(profile, model, experts or f"experts of {name}")
    compression_of(model).margin = QUANTISED_MARGIN
    return report


def shipped_experts(name: str) -> SpeakerProfile | None:
    """The pretrained experts in this package for a model's name; None if there are none."""
    if Path(name).name != name or Path(name).exists():  # a folder comes before a name
        return None
    resource = files("saml_models.shipped") / "experts" / f"{name}.safetensors"
    if not resource.is_file():
        return None
    with as_file(resource) as path:
        return SpeakerProfile.load(path)


def pretrained_experts(name: str, experts: str | os.PathLike[str]) -> SpeakerProfile:
    """Those in a file, or by a name those in this package that are not for every use of a model.

    `base` hears many languages: what it learnt for one of them is taken when asked for, "english".

    Args:
        name: what the model was loaded by.
        experts: a file, which comes before a name.

    Raises:
        SAMLError: there is neither, or the file is damaged.
    """
    word = os.fspath(experts)
    if Path(word).exists() or not word.isidentifier():
        return SpeakerProfile.load(experts)
    profile = shipped_experts(f"{name}.{word}")
    if profile is None:
        raise SAMLError(f"{word}: no such file, and no experts of that name for {name}")
    return profile


def profile_config(profile: SpeakerProfile) -> SAMLConfig:
    """The configuration in a profile's header.

    Raises:
        SAMLError: a value is not allowed, or asks for more experts than the file holds.
    """
    config = SAMLConfig.from_dict(profile.config)
    if config.num_experts * config.rank > MOST:
        raise SAMLError(
            f"profile: says {config.num_experts} experts of rank {config.rank}; expected at most "
            f"{MOST} ranks in all"
        )
    if profile.kind == "gates":
        return config
    if config.num_experts * config.rank > sum(t.numel() for t in profile.tensors.values()):
        raise SAMLError(
            f"profile: says {config.num_experts} experts of rank {config.rank}, more than the "
            "file holds; make it again"
        )
    return config


def _check_whole(profile: SpeakerProfile, source: str | os.PathLike[str]) -> None:
    if profile.kept:
        raise SAMLError(f"{source}: is pruned; start from whole experts")


def _check_shapes(
    profile: SpeakerProfile, model: Any, config: SAMLConfig, source: str | os.PathLike[str]
) -> None:
    """Refuse, before a calibration, experts that are damaged or of layers of other sizes."""
    shapes = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in model.parameters()
    }
    skeleton = copy.deepcopy(model, shapes)  # with these for the model's own: it takes no memory
    apply_saml(skeleton, replace(config, expert_init="lora"))
    try:
        profile.experts(skeleton)
    except SAMLError as error:
        raise SAMLError(f"{source}: {error}") from error


def _apply(profile: SpeakerProfile, model: Any, source: str | os.PathLike[str]) -> None:
    _check_whole(profile, source)
    try:
        profile.apply(model)
    except SAMLError as error:
        raise SAMLError(f"{source}: {error}") from error
