"""A Conformer as a file of its difference to the public Whisper that it grew from.

The container is safetensors. Of the branches that the Whisper has not, matrices are int8 with one
scale in 128 elements (`<name>.int8`, `<name>.scale`), vectors and depthwise convolutions float16
(`<name>`). Of what was trained in the Whisper's own layers, matrices are the Whisper's values in
float16 plus an NF4 difference (`<name>.delta.` and the parts of a `QuantizedTensor`), vectors are
float16 as they are. All other parameters are the Whisper's in float16. The metadata's JSON names
the Whisper, its hash and that of the result. The reader's sums and products are of IEEE 754, in
float32, element by element: the same on every machine.
"""

from __future__ import annotations

import json
import os
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saml_kernels import QuantizedTensor, quantize
from saml_kernels.errors import SAMLError, one_line
from saml_models.compress.layers import parameters_hash
from saml_models.compress.packing import pack_experts, unpack_expert
from saml_models.models.whisper.conformer import (
    ConformerWhisper,
    ConformerWhisperConfig,
    new_branches,
)
from saml_models.models.whisper.loading import OPENAI_NAMES, load_whisper
from saml_models.runtime.tensors import read_description, read_tensors, write_tensors

__all__ = ["find_difference", "read_difference", "write_difference"]

KIND, VERSION = "saml-difference", 1
FORMAT, BLOCK = "nf4", 64  # of differences
PARTS = ("codes", "absmax", "nested_absmax", "offset")
SETTINGS = ("conv_kernel_size", "half_step_ffn_dim", "window_margin")  # that Whisper's lack


def find_difference(name_or_path: str | os.PathLike[str]) -> Path | Traversable | None:
    """The file of a Conformer by its path, or by the name of one that ships with the package."""
    path = Path(name_or_path).expanduser()
    if path.exists():  # before a name
        return path if path.is_file() and path.suffix == ".safetensors" else None
    if path.name != os.fspath(name_or_path):
        return None
    shipped = files("saml_models.shipped") / "conformers" / f"{path.name}.safetensors"
    return shipped if shipped.is_file() else None


@torch.no_grad()
def write_difference(path: Path, model: ConformerWhisper, whisper: nn.Module, name: str) -> int:
    """Write what `read_difference` reads; the model that comes back is rounded.

    Args:
        path: replaced, whole or not at all.
        model: a Conformer at full precision.
        whisper: that it grew from, at full precision.
        name: openai-whisper's, that `load_whisper` finds `whisper` by.

    Returns:
        Bytes of the file.

    Raises:
        SAMLError: the model is no Conformer at full precision or did not grow from that Whisper,
            the name is not openai-whisper's, or a weight is not finite.
    """
    if not isinstance(model, ConformerWhisper) or hasattr(model, "saml"):
        raise SAMLError(f"{type(model).__name__}: expected a ConformerWhisper at full precision")
    if name not in OPENAI_NAMES:
        raise SAMLError(f"{name}: expected one of {', '.join(OPENAI_NAMES)}, which everybody finds")
    public, new = dict(whisper.named_parameters()), new_branches(model)
    tensors: dict[str, Tensor] = {}
    for key, parameter in model.named_parameters():
        value = parameter.detach().float().cpu()
        if key not in new and (key not in public or public[key].shape != value.shape):
            raise SAMLError(f"{key}: not as in {name}; give the Whisper that the model grew from")
        before = None if key in new else _released(public[key])
        if before is not None and torch.equal(before, value):
            continue
        if value.dim() == 1 or ".depthwise." in key:
            tensors |= pack_experts({key: value}, "float16")
        elif before is None:
            tensors |= pack_experts({key: value}, "int8")
        else:
            delta = quantize(value - before, FORMAT, BLOCK, name=key)
            tensors |= {f"{key}.delta.{part}": getattr(delta, part) for part in PARTS}
    own = {name: getattr(model.config, name) for name in SETTINGS}
    back = _filled(ConformerWhisper.grown_from(whisper, **own), dict(tensors), public)  # type: ignore[arg-type]
    about = {
        "kind": KIND,
        "version": VERSION,
        "base": name,
        "base_sha256": parameters_hash(whisper),
        "result_sha256": parameters_hash(back),
        "config": own,
    }
    write_tensors(path, tensors, {"saml": json.dumps(about)})
    return path.stat().st_size


@torch.no_grad()
def read_difference(path: str | os.PathLike[str]) -> tuple[ConformerWhisper, Any]:
    """A Conformer in float32 on the CPU, in evaluation mode, and its processor.

    Args:
        path: of a file that `write_difference` wrote.

    Raises:
        SAMLError: the file is missing, damaged or of a newer version, or its Whisper cannot be
            found or is another one.
    """
    tensors, metadata = read_tensors(path)
    about = read_description(path, metadata, KIND, VERSION, "difference to a Whisper")
    own, name = about.get("config"), about.get("base")
    if name not in OPENAI_NAMES or not isinstance(own, dict) or set(own) != set(SETTINGS):
        raise SAMLError(f"{path}: damaged description; copy the file again")
    whisper, processor = load_whisper(name)
    if parameters_hash(whisper) != about.get("base_sha256"):
        raise SAMLError(f"{path}: grew from another {name} than the one that is found here")
    try:
        values: Any = whisper.config.to_dict() | own
        values.pop("model_type")
        with torch.device("meta"):
            skeleton = ConformerWhisper(ConformerWhisperConfig(**values))
        for key, parameter in new_branches(skeleton).items():  # before they take memory
            stored = tensors.get(key, tensors.get(f"{key}.int8"))
            if stored is None or stored.numel() != parameter.numel():
                raise SAMLError(f"{key}: missing, or of another size")
        model = ConformerWhisper.grown_from(whisper, **own)
        _filled(model, tensors, dict(whisper.named_parameters()))
    except Exception as error:  # transformers, too, of values it does not expect
        raise SAMLError(f"{path}: {one_line(error)}; copy the file again") from error
    if parameters_hash(model) != about.get("result_sha256"):
        raise SAMLError(f"{path}: does not match its description; copy the file again")
    return model.eval(), processor


def _filled(
    model: ConformerWhisper, tensors: dict[str, Tensor], public: dict[str, nn.Parameter]
) -> ConformerWhisper:
    """Give a grown model what the file says; `tensors` are taken from their dict."""
    for key, parameter in model.named_parameters():
        delta: dict[str, Any] = {p: tensors.pop(f"{key}.delta.{p}", None) for p in PARTS}
        stored = {k: tensors.pop(k) for k in (key, f"{key}.int8", f"{key}.scale") if k in tensors}
        if delta["codes"] is not None:
            weight = QuantizedTensor.from_parts(
                **delta, shape=list(parameter.shape), format=FORMAT, block_size=BLOCK
            )
            value = _released(public[key]) + weight.validate(key).dequantize()
        elif stored:
            value = unpack_expert(stored, key, parameter.shape)
        else:
            value = _released(public[key])
        parameter.copy_(value)
    if tensors:
        raise SAMLError(f"{next(iter(tensors))}: not of this model")
    return model


def _released(parameter: Tensor) -> Tensor:
    """As OpenAI released it."""
    return parameter.detach().cpu().half().float()
