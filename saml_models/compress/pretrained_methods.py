"""transformers' methods on a model with low-bit weights: what works, and one line for the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from saml_kernels.errors import SAMLError
from saml_kernels.quantization.tensor import QuantizedTensor
from saml_models.compress.pretrained_folder import save_pretrained

__all__ = ["adjust_methods", "is_pretrained"]


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is transformers' `PreTrainedModel`, asked without importing transformers."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__ == "transformers.modeling_utils"
        for kind in type(model).__mro__
    )


def adjust_methods(model: nn.Module) -> None:
    """Adjust what reads or writes weights to the layers that `model` has now, in place.

    The whole model is saved with a description of its layers; saving a part and resizing are
    refused in one line, ties between layers that were replaced are forgotten (the layers keep
    them), and a full-precision state dict is not half loaded.
    """
    module: Any
    whole = is_pretrained(model)
    for module in model.modules():
        for name in ("save_pretrained", "push_to_hub"):
            if hasattr(module, name) and not (whole and module is model):
                setattr(module, name, partial(_refuse, name))
        if hasattr(module, "resize_token_embeddings"):
            module.resize_token_embeddings = partial(_resize, _embedding_of(module))
        module._is_hf_initialized = True  # what `init_weights` leaves alone
        _forget_ties(module)
    if whole:
        # No bound method: of one, pickle keeps the name alone.
        setattr(model, "save_pretrained", partial(save_pretrained, model))  # noqa: B010
    model.register_load_state_dict_pre_hook(_refuse_full_precision)


def _refuse(method: str, *args: Any, **kwargs: Any) -> None:
    raise SAMLError(
        f"{method}: holds low-bit weights of a whole model of transformers only; save that, or "
        "SpeakerProfile.of(model).save(file) for the experts alone"
    )


def _embedding_of(model: Any) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # an encoder of audio has none
        return None


def _resize(
    embedding: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> nn.Module:
    rows = getattr(embedding, "num_embeddings", None)
    if rows is not None and new_num_tokens in (None, rows) and not any((*args, *kwargs.values())):
        return embedding
    raise SAMLError(
        f"resize_token_embeddings: the table of {rows} tokens is in low bits and stays as it is; "
        "resize the full-precision model, then apply_saml"
    )


def _forget_ties(module: Any) -> None:
    """`tie_weights` looks for parameters; those of replaced layers are no more."""
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        ties = getattr(module, name, None)
        if isinstance(ties, Mapping) and ties:
            names = [n for n, _ in module.named_parameters(remove_duplicate=False)]
            left = {
                target: source
                for target, source in ties.items()
                if all(any(re.match(p, n) for n in names) for p in (target, source))
            }
            setattr(module, name, left)


def _refuse_full_precision(
    model: nn.Module, state: Mapping[str, Any], prefix: str, *args: Any
) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedTensor) and f"{prefix}{name}" in state:
            raise SAMLError(
                f"{prefix}{name}: in full precision, where the model has {module.format}; load "
                "into the full-precision model, then apply_saml"
            )
