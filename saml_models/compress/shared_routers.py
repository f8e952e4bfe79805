"""The paper's three routers, shared by all layers of a kind (`router="shared"`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from saml_kernels import SAMLConfig
from saml_kernels.layers.context import BatchContext, BlockGates
from saml_kernels.layers.routers import SharedRouter
from saml_models.compress.layers import ATTENTION_PROJECTIONS


def attention_blocks(model: nn.Module) -> dict[str, BlockGates]:
    """A gate slot for every module that holds the four attention projections."""
    return {
        name: BlockGates()
        for name, module in model.named_modules()
        if sum(hasattr(module, p) for p in ATTENTION_PROJECTIONS) == 4  # out_proj or o_proj
    }


def attach_shared_routers(
    model: Any, config: SAMLConfig, context: BatchContext, blocks: dict[str, BlockGates]
) -> None:
    """Three routers for the whole model (encoder self, decoder self, cross), run by hooks."""
    width = width_of(model) or 0
    model.saml_routers = nn.ModuleDict(
        {
            "encoder": SharedRouter(width, config, context),
            "decoder": SharedRouter(width, config, context, text=True),
            "cross": SharedRouter(width, config, context, text=True, cross=True),
        }
    ).to(next(model.parameters()).device)
    model.get_decoder().register_forward_pre_hook(
        partial(_forget_gates, [s for n, s in blocks.items() if ".decoder." in f".{n}"]),
        with_kwargs=True,
    )
    for name, slot in blocks.items():
        cross = name.endswith("encoder_attn")
        kind = "cross" if cross else "decoder" if ".decoder." in f".{name}" else "encoder"
        hook = partial(_run_shared_router, model.saml_routers[kind], slot)
        model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)


def _forget_gates(
    slots: list[BlockGates], module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    """A decoder pass that continues no cached one belongs to other clips: it gets new gates."""
    cache = _cache(kwargs)
    if cache is None or cache.get_seq_length() == 0:
        for slot in slots:
            slot.gates = None


def _cache(kwargs: dict[str, Any]) -> Any:
    """The decoder's cache by either of its names: transformers 5.24 renamed it."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def _run_shared_router(
    router: SharedRouter,
    slot: BlockGates,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    encoded = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
    # Training shows the router the whole text, cached decoding one token: keep the first gates.
    if _cache(kwargs) is not None and slot.gates is not None:
        return
    slot.gates = router(hidden, encoded)


def watch_encoder(model: Any, context: BatchContext) -> None:
    """After the encoder has run, its pooled output is what the decoder's routers see."""
    if not hasattr(model, "get_encoder"):
        return

    model.get_encoder().register_forward_hook(partial(_keep_clip, context))


def _keep_clip(context: BatchContext, module: nn.Module, args: Any, output: Any) -> None:
    hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
    context.clip = context.pooled(hidden)


def width_of(model: nn.Module) -> int | None:
    """Of the encoder's output, where there is an encoder."""
    config = getattr(model, "config", None)
    encoder = getattr(config, "encoder_config", None)
    return getattr(encoder, "hidden_size", getattr(config, "d_model", None))
