"""Giving a model SAML layers in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from saml_kernels import SAMLConfig
from saml_models.compress.calibration import Calibration
from saml_models.compress.pretrained_methods import is_pretrained
from saml_models.compress.replacement import CompressionReport, replace_layers

__all__ = ["CompressionReport", "apply_saml", "unless_refused"]


def apply_saml(
    model: nn.Module,
    config: SAMLConfig,
    *,
    formats: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
) -> CompressionReport:
    """Replace, in place, what `config` covers; everything else is frozen.

    Linear layers become `SAMLLinear` (with experts where `config.targets` says so), convolutions
    of kernel 1 `SAMLPointwiseConv1d`, other ungrouped convolutions `QuantizedConv1d` and
    `QuantizedConv2d`, token embeddings `SAMLEmbedding` with the output heads tied to them. What
    might mean something else afterwards stays as it is and is named in the report: subclasses of
    these layers, those with hooks, grouped convolutions, positions, attention and recurrent layers
    with matrices of their own. A model on the meta device gets empty layers there, to be filled
    from a file. Frozen floating parameters and norms' statistics are rounded to float16, as they
    are stored, so that a saved model gives the same logits bit for bit.

    The methods `save_pretrained` and `from_pretrained` of a model of transformers write and read
    the result from here on; see `saml_models.hf`.

    Args:
        model: any module with layers to replace, at full precision.
        config: of all of them.
        formats: of single layers, by their path in the model, in place of `config.format`.
        calibration: weights to take in place of plainly rounded ones, from `calibrate` with the
            same model and format. Experts then start as a LoRA does.

    Raises:
        SAMLError: formats and a calibration are given, or that is of another model or format; the
            model was treated before, is a single layer or has none to replace, has PEFT adapters or
            parameters without a shape, or holds NaN, infinity or values beyond float16. The model
            is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> apply_saml(model, SAMLConfig(num_experts=2, rank=4)).replaced
        {'SAMLLinear': 2}
    """
    report = replace_layers(model, config, formats=formats, calibration=calibration)
    if is_pretrained(model):
        # Its import registers it; a model without transformers does not wait for transformers.
        import saml_models.compress.quantizer  # noqa: F401
    return report


@contextmanager
def unless_refused(model: nn.Module) -> Iterator[None]:
    """Whatever the block replaces and rounds in a model stays, unless the block raises."""
    own = [vars(module) for module in model.modules()]
    held = [value for state in own for value in state.values() if isinstance(value, dict)]
    before = [(state, dict(state)) for state in (*own, *held)]
    parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    except BaseException:
        for state, values in before:
            state.clear()
            state.update(values)
        for parameter, data, learns in parameters:
            parameter.data = data
            parameter.requires_grad_(learns)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        raise
