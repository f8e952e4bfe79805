"""Low-bit weights and experts as a quantisation method of transformers, "saml".

Its import registers it, so that `from_pretrained` of a folder that `save_pretrained` wrote gives
the model back, bit for bit; `from_pretrained(..., quantization_config=SAMLQuantizationConfig())`
compresses a full-precision model once it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from saml_kernels import SAMLConfig
from saml_kernels.errors import SAMLError
from saml_models.compress.layers import compression_of, is_margin
from saml_models.compress.pretrained_folder import METHOD, NOTE, VERSION, describe
from saml_models.compress.replacement import replace_layers
from saml_models.runtime.tensors import TensorHeader, read_headers

__all__ = ["SAMLQuantizationConfig", "SAMLQuantizer"]


@register_quantization_config(METHOD)
class SAMLQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` in a config.json, or an argument of `from_pretrained`.

    Attributes:
        saml: `SAMLConfig` as plain values.
        formats: of single layers, as for `apply_saml`.
        version: of the format.
        short_windows, margin, calibration: as in `Compression`.
        weight_hash: of the saved weights; None where there are none yet.
        note: what to do before loading, for who reads the file.
    """

    def __init__(
        self,
        saml: SAMLConfig | dict[str, Any] | None = None,
        formats: dict[str, Any] | None = None,
        version: int = VERSION,
        short_windows: bool = False,
        margin: float | None = None,
        weight_hash: str | None = None,
        note: str = NOTE,
        calibration: dict[str, Any] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        """Check values, which may come from a file.

        Raises:
            SAMLError: a value is of the wrong type, or of a newer version than this one.
        """
        if unknown:
            raise SAMLError(f"quantization_config: unknown key {next(iter(unknown))!r}")
        if type(version) is not int or version < 1:
            raise SAMLError(f"quantization_config: version {version!r}; expected a number from 1")
        if version > VERSION:
            raise SAMLError(
                f"quantization_config: version {version}, of a newer saml-kernels; this one reads "
                f"up to {VERSION}: upgrade it"
            )
        if formats is not None and not isinstance(formats, dict):
            raise SAMLError(f"quantization_config: formats={formats!r}; expected layers' formats")
        if saml is not None and not isinstance(saml, SAMLConfig | dict):
            raise SAMLError(f"quantization_config: saml={saml!r}; expected SAMLConfig's values")
        if type(short_windows) is not bool:
            raise SAMLError(
                f"quantization_config: short_windows={short_windows!r}; expected true or false"
            )
        if not is_margin(margin):
            raise SAMLError(f"quantization_config: margin={margin!r}; expected seconds or null")
        if weight_hash is not None and not isinstance(weight_hash, str):
            raise SAMLError(f"quantization_config: weight_hash={weight_hash!r}; expected a hash")
        if calibration is not None and not isinstance(calibration, dict):
            raise SAMLError(f"quantization_config: calibration={calibration!r}; expected an object")
        config = SAMLConfig.from_dict(saml) if isinstance(saml, dict) else saml or SAMLConfig()
        self.quant_method: Any = METHOD
        self.saml, self.formats = config.to_dict(), dict(formats or {})
        self.version, self.note = version, note
        self.short_windows, self.margin, self.weight_hash = short_windows, margin, weight_hash
        if calibration is not None:
            self.calibration = calibration


@register_quantizer(METHOD)
class SAMLQuantizer(HfQuantizer):
    """What `from_pretrained` asks while it loads a model with low-bit weights, or makes one."""

    quantization_config: SAMLQuantizationConfig

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """`Trainer` may train it: experts and routers have gradients."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """It needs no PEFT adapters for that."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile traces its layers."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.pre_quantized:
            return
        config = SAMLConfig.from_dict(self.quantization_config.saml)
        stored = _headers(checkpoint_files)
        if stored is not None and config.num_experts * config.rank > sum(
            math.prod(header.shape) for header in stored.values()
        ):
            raise SAMLError(
                f"quantization_config: says {config.num_experts} experts of rank {config.rank}, "
                "more than the weights' file holds; copy it again"
            )
        _tie(model, stored or {})
        # LoftQ's singular vectors would be overwritten by the stored experts: do not compute them.
        replace_layers(
            model, replace(config, expert_init="lora"), formats=self.quantization_config.formats
        )
        compression_of(model).config = config
        if stored is not None:
            _check_fits(model, stored)
            _keep_dtypes(model, stored)
            self._whole = stored.keys() <= model.state_dict().keys()
        for module in model.modules():
            if module._non_persistent_buffers_set:
                module._is_hf_initialized = False  # these are in no file: transformers makes them

    _whole = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        about = self.quantization_config
        if not self.pre_quantized:
            replace_layers(model, SAMLConfig.from_dict(about.saml), formats=about.formats)
        saml = compression_of(model)
        saml.short_windows, saml.margin = about.short_windows, about.margin
        saml.calibration = getattr(about, "calibration", None)
        if not self.pre_quantized:
            about.weight_hash = describe(saml)["weight_hash"]
            return
        experts = {id(parameter) for parameter in saml.experts().values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in experts)
        for module in model.modules():
            module._is_hf_initialized = True
        tensors = model.state_dict()
        for name, tensor in tensors.items():
            checkable = tensor.is_floating_point() and not tensor.is_meta
            if checkable and not torch.isfinite(tensor).all():
                raise SAMLError(f"{name}: holds NaN or infinity; copy the weights' file again")
        # What is offloaded is on the meta device; another class may have left a head in the file.
        here = not any(tensor.is_meta for tensor in tensors.values())
        if here:
            saml.check_finer()
        whole = self._whole and here
        if whole and saml.weight_hash() != about.weight_hash:
            raise SAMLError(
                "quantization_config: weight_hash is not that of the weights; copy config.json and "
                "the weights' file again"
            )


def _headers(files: list[str] | None) -> dict[str, TensorHeader] | None:
    """What is in a model's files, by name; None where it comes from a state dict."""
    if files is None:
        return None
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise SAMLError(f"{file}: expected safetensors; save the model with save_pretrained")
    return {name: header for file in files for name, header in read_headers(file).items()}


def _tie(model: Any, stored: Collection[str]) -> None:
    """Tie heads now, where the file has none of their own: transformers waits with that."""
    for target, source in model.all_tied_weights_keys.items():
        if f"{target}.codes" not in stored:
            owner, _, name = target.rpartition(".")
            setattr(model.get_submodule(owner), name, model.get_parameter(source))


def _check_fits(model: Any, stored: dict[str, TensorHeader]) -> None:
    """Before memory is taken: every tensor is in the file, in its shape, and codes are codes."""
    for name, wanted in model.state_dict().items():
        header = stored.get(name)
        if header is None and name in model.all_tied_weights_keys:
            continue
        if header is None:
            saved = ", ".join(model.config.architectures or ()) or "another model"
            raise SAMLError(
                f"{name}: not in the weights' file, which is of {saved}; load that class, or copy "
                "the folder again"
            )
        floats = header.dtype.is_floating_point and wanted.dtype.is_floating_point
        fixed = name.rpartition(".")[0] in compression_of(model).weights or not floats
        if header.shape != wanted.shape or (fixed and header.dtype != wanted.dtype):
            raise SAMLError(
                f"{name}: {header.dtype} {tuple(header.shape)} in the weights' file; expected "
                f"{wanted.dtype} {tuple(wanted.shape)}: config.json and the file are of two models"
            )


def _keep_dtypes(model: Any, stored: dict[str, TensorHeader]) -> None:
    """Asked for in the dtype that it has, a model keeps parameters of other dtypes as they are."""
    tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if n in stored}
    first = next(name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter))
    if stored[first].dtype == model.config.dtype:
        for name, tensor in tensors.items():
            tensor.data = torch.empty_like(tensor, dtype=stored[name].dtype)
