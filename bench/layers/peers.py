"""Contenders from other packages, each through its own public interface.

Imported where they are used; what is not installed, or cannot run here, says why.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.layers.contenders import (
    Contender,
    Layer,
    Operands,
    one_lora,
    softmax_gates,
    speaker_index,
)

__all__ = ["GatedPeftLinear", "bitsandbytes_linear", "peer_contenders"]

GROUP = 64  # of INT4 peers, as NF4's blocks


@contextmanager
def _silenced() -> Iterator[None]:
    """Packages that log and warn of optional parts as they are imported or used."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@cache
def _import_error(module: str) -> str | None:
    """Why a module cannot be imported, in one line; None if it can."""
    if find_spec(module.partition(".")[0]) is None:
        return "not installed"
    try:
        with _silenced():
            importlib.import_module(module)
    except Exception as error:  # peers fail in ways of their own
        return f"does not import here: {str(error).strip().partition(chr(10))[0]}"
    return None


def _needs(*modules: str, gpu: str | None = None, otherwise: str | None = None) -> Any:
    """A `why_not`: modules that must import; `gpu` why it needs one; `otherwise` how to get it."""

    def why_not(device: torch.device) -> str | None:
        if gpu and device.type != "cuda":
            return f"needs a GPU: {gpu}"
        for module in modules:
            error = _import_error(module)
            if error:
                return f"{module.partition('.')[0]} {error}" + (f" ({otherwise})" * bool(otherwise))
        return None

    return why_not


def bitsandbytes_linear(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """`linear` as a bitsandbytes NF4 layer with double quantisation, on the same device."""
    with _silenced():
        import bitsandbytes as bnb

        out_features, in_features = linear.weight.shape
        layer = bnb.nn.Linear4bit(
            in_features, out_features, linear.bias is not None, compute_dtype=dtype,
            quant_type="nf4",
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            linear.weight.detach().clone(), requires_grad=False, quant_type="nf4"
        )
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        # In eval mode it would repack a CPU weight for bfloat16 and round its scales.
        layer.to(linear.weight.device).train()
        layer.weight.quant_state.dtype = dtype  # as if made from a model of that dtype
        return layer


def _peft_layer(base: nn.Module, adapters: int, rank: int, dtype: torch.dtype) -> Any:
    """PEFT's layer around `base` with that many LoRAs, named "0", "1", ..."""
    from peft import LoraConfig, get_peft_model

    with _silenced():
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"])
        model: Any = get_peft_model(_Model(base), config, adapter_name="0")
        for e in range(1, adapters):
            model.add_adapter(str(e), config)
        layer = model.base_model.model.model.linear
    # PEFT keeps adapters of 16-bit models in float32; here they run in the layer's own dtype.
    for half in (layer.lora_A, layer.lora_B):
        half.to(dtype).requires_grad_(True)
    return layer


class _Model(nn.Module):
    """The least that PEFT takes for a model."""

    def __init__(self, linear: nn.Module) -> None:
        from transformers import PretrainedConfig

        super().__init__()
        self.config = PretrainedConfig()
        self.model = nn.Module()
        self.model.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.model.linear(x)  # type: ignore[operator]


class GatedPeftLinear(nn.Module):
    """What a user writes today: a PEFT layer over bitsandbytes whose E LoRAs are gated by token.

    Args:
        linear: becomes the 4-bit base.
        experts, rank: E and r; scale 1.
        dtype: of the adapters and of the products.
        routed: give it a token router of its own, softmax(x V^T).
    """

    def __init__(
        self, linear: nn.Linear, experts: int, rank: int, dtype: torch.dtype, routed: bool = False
    ) -> None:
        super().__init__()
        self.layer = _peft_layer(bitsandbytes_linear(linear, dtype), experts, rank, dtype)
        place: Any = {"device": linear.weight.device, "dtype": dtype}
        width = linear.in_features
        self.router = nn.Linear(width, experts, bias=False, **place) if routed else None

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """x [..., K], gates [..., E] unless routed -> [..., N]."""
        if gates is None:
            assert self.router is not None
            gates = softmax_gates(x, self.router.weight)
        layer = self.layer
        y = layer.base_layer(x)
        for e in range(gates.shape[-1]):
            down, up = layer.lora_A[str(e)], layer.lora_B[str(e)]
            y = y + gates[..., e : e + 1] * up(down(x)) * layer.scaling[str(e)]
        return y


def _plain(o: Operands) -> nn.Linear:
    linear = nn.Linear(o.case.k, o.case.n, device="meta")
    linear.weight = nn.Parameter(o.weight.to(o.dtype), requires_grad=False)
    linear.bias = nn.Parameter(o.bias.to(o.dtype), requires_grad=False)
    return linear


def _float_linear(o: Operands) -> nn.Linear:
    """In float32, so that NF4 codes are the same as everybody's."""
    linear = nn.Linear(o.case.k, o.case.n, device="meta")
    linear.weight = nn.Parameter(o.weight, requires_grad=False)
    linear.bias = nn.Parameter(o.bias, requires_grad=False)
    return linear


def _set_adapters(layer: Any, lora_a: Tensor, lora_b: Tensor) -> list[Tensor]:
    """Write [E, r, K] and [E, N, r] into a PEFT layer's LoRAs; its parameters."""
    with torch.no_grad():
        for e, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            layer.lora_A[str(e)].weight.copy_(a)
            layer.lora_B[str(e)].weight.copy_(b)
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]


def _bitsandbytes(o: Operands) -> Layer:
    layer = bitsandbytes_linear(_float_linear(o), o.dtype)
    return Layer(lambda x, gates: layer(x))


def _gated_peft(o: Operands) -> Layer:
    case, router = o.case, o.own_router()
    module = GatedPeftLinear(_float_linear(o), case.experts, case.rank, o.dtype, router is not None)
    for half in (module.layer.lora_A, module.layer.lora_B):
        half.to(o.trained)
    trainable = _set_adapters(module.layer, o.lora_a[0], o.lora_b[0])
    if module.router is None or router is None:
        return Layer(module, trainable)
    module.router.weight = nn.Parameter(router, case.mode == "train")
    return Layer(lambda x, gates: module(x), trainable, router=module.router.weight)


class _ManualLoRA(torch.autograd.Function):
    """Y = X W^T + (X A^T) B^T with a chain rule of its own, W dequantised anew in each direction.

    With G = dY:  dX = G W + (G B) A,  dA = (G B)^T X,  dB = G^T (X A^T).
    Source: the derivation that Unsloth publishes for its LoRA layers; its package is for whole
    language models, asks for a GPU as it is imported, and pins an older transformers. Additions
    in place, no gates, one adapter, bitsandbytes' own dequantisation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.weight = weight
        y = F.linear(x, _dequantised(weight), bias)
        return y.addmm_(x @ a.T, b.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, a, b = ctx.saved_tensors
        down = dy @ b
        da, db = down.T @ x, dy.T @ (x @ a.T)
        dx = dy @ _dequantised(ctx.weight)
        return dx.addmm_(down, a), None, da, db, None


def _dequantised(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _manual(o: Operands) -> Layer:
    weight, (bias,) = bitsandbytes_linear(_float_linear(o), o.dtype).weight, o.cast(o.bias)
    a, b = o.trainable(*one_lora(o))

    def call(x: Tensor, gates: Tensor) -> Tensor:
        return _ManualLoRA.apply(x, weight, a.to(x.dtype), b.to(x.dtype), bias)

    return Layer(call, [a, b])


def _mixed_batch(o: Operands) -> Layer:
    """PEFT's `adapter_names`: one LoRA of rank E r for each speaker, no gates."""
    base = bitsandbytes_linear(_float_linear(o), o.dtype)
    s, r = o.case.speakers, o.case.experts * o.case.rank
    layer = _peft_layer(base, s, r, o.dtype).eval()  # it mixes adapters at inference only
    base.train()  # see bitsandbytes_linear
    _set_adapters(layer, o.lora_a.flatten(1, 2), o.lora_b.permute(0, 1, 3, 2).flatten(1, 2).mT)
    index = speaker_index(o.case, s, torch.device("cpu"))[:: o.case.clip]
    names = [str(i) for i in index.tolist()]

    def call(x: Tensor, gates: Tensor) -> Tensor:
        clips = x.unflatten(0, (len(names), o.case.clip))
        return layer(clips, adapter_names=names).flatten(0, 1)

    return Layer(call)


def _xlora(o: Operands) -> Layer:
    """One layer of a PEFT X-LoRA model, its scalings given: its classifier is not timed."""
    from peft import PeftModel, XLoraConfig, get_peft_model

    e = o.case.experts
    with _silenced(), tempfile.TemporaryDirectory() as folder:
        saved = _save_adapters(o, Path(folder))
        config = XLoraConfig(
            hidden_size=o.case.k, adapters=saved, layerwise_scalings=True,
            use_trainable_adapters=True,
        )  # fmt: skip
        model: PeftModel = get_peft_model(_Model(_plain(o)), config)  # type: ignore[assignment]
    layer: Any = model.base_model.lora_model.model.model.linear  # type: ignore[union-attr]
    for half in (layer.lora_A, layer.lora_B):
        half.to(o.device, o.trained).requires_grad_(o.case.mode == "train")
    trainable = _set_adapters(layer, o.lora_a[0], o.lora_b[0])
    assert len(layer.active_adapters) == e

    router = o.own_router()

    def call(x: Tensor, gates: Tensor) -> Tensor:
        if router is not None:
            gates = softmax_gates(x, router)
        return layer(x[None], scalings=gates[None, :, None]).squeeze(0)

    return Layer(call, trainable, router=router)


def _save_adapters(o: Operands, folder: Path) -> dict[str, str]:
    """E LoRAs on disk, which is where X-LoRA takes its experts from: name -> folder."""
    from peft import LoraConfig, get_peft_model

    rank = o.case.rank
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"])
    model: Any = get_peft_model(_Model(_plain(o)), config, adapter_name="0")
    for e in range(1, o.case.experts):
        model.add_adapter(str(e), config)
    model.save_pretrained(folder)
    return {str(e): str(folder / str(e)) for e in range(o.case.experts)}


def _int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round to 4 bits by groups along K: codes uint8 [N, K], scales and zeros [N, K / GROUP]."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low).clamp_min(1e-8) / 15
    zeros = -low / scales
    codes = (groups / scales[..., None] + zeros[..., None]).round_().clamp_(0, 15)
    return codes.flatten(1).to(torch.uint8), scales, zeros


def _gemlite(o: Operands) -> Layer:
    from gemlite.helper import A16Wn

    codes, scales, zeros = _int4(o.weight)
    processor = A16Wn(device=str(o.device), dtype=o.dtype)
    scales, zeros = scales.to(o.dtype), zeros.to(o.dtype)
    layer = processor.from_weights(codes, scales, zeros, 4, GROUP, o.bias.to(o.dtype))
    float_codes = codes.double().unflatten(1, (-1, GROUP))
    stands_for = ((float_codes - zeros.double()[..., None]) * scales.double()[..., None]).flatten(1)
    return Layer(lambda x, gates: layer(x), weight=stands_for)


def _torchao(o: Operands) -> Layer:
    """bfloat16, which is all that its layout takes: x is given so, y comes back as it was."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = _plain(o).to(torch.bfloat16)
    layout: Any = "tile_packed_to_4d"
    quantize_(linear, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=layout))
    eye = torch.eye(o.case.k, device=o.device, dtype=torch.bfloat16)
    stands_for = F.linear(eye, linear.weight).T.double()
    return Layer(lambda x, gates: linear(x.to(torch.bfloat16)).to(x.dtype), weight=stands_for)


def _lorafusion(o: Operands) -> Layer:
    from lorafusion.ops.lora_v1 import fused_linear_lora

    weight, bias = o.cast(o.weight, o.bias)
    a, b = o.trainable(*one_lora(o))

    def call(x: Tensor, gates: Tensor) -> Tensor:
        return fused_linear_lora(x[None], weight, a, b, 1.0, linear_bias=bias).squeeze(0)

    return Layer(call, [a, b])


def _axolotl(o: Operands) -> Layer:
    """ScatterMoE-LoRA with one expert: the dense layer with one fused LoRA."""
    from axolotl.integrations.kernels.libs.scattermoe_lora import (
        flatten_sort_count,
        parallel_linear_lora,
    )

    weight, bias = o.cast(o.weight.T[None].contiguous(), o.bias[None])
    a, b = o.trainable(*one_lora(o))
    routing = flatten_sort_count(torch.zeros(o.case.m, 1, dtype=torch.long, device=o.device), 1)

    def call(x: Tensor, gates: Tensor) -> Tensor:
        return parallel_linear_lora(x, weight, 1, *routing, a, b, 1.0, expert_biases=bias)

    return Layer(call, [a, b])


def peer_contenders() -> list[Contender]:
    """Every peer; `why_not` tells those that cannot run here."""
    run: tuple[str, ...] = ("eager", "graph")
    bnb: Callable[[torch.device], str | None] = _needs("bitsandbytes")
    peft = _needs("bitsandbytes", "peft")
    return [
        Contender("bitsandbytes", _bitsandbytes, "nf4", package="bitsandbytes", why_not=bnb),
        Contender("Unsloth's derivation", _manual, "nf4", "one", why_not=bnb),
        Contender("bitsandbytes + gated PEFT", _gated_peft, "nf4", "gated", None, "peft",
                  why_not=peft),
        Contender("bitsandbytes + PEFT, mixed batch of 64", _mixed_batch, "nf4", "one", 64, "peft",
                  ("eager",), peft),  # it indexes by lists of the host
        Contender("PEFT X-LoRA", _xlora, "dense", "gated", None, "peft", why_not=_needs("peft")),
        Contender("GemLite INT4", _gemlite, "int4", package="gemlite", modes=run,
                  why_not=_needs("gemlite", gpu="its kernels are Triton's, its import asks CUDA")),
        Contender("torchao INT4", _torchao, "int4", package="torchao", modes=run,
                  why_not=_needs("torchao", gpu="its INT4 layouts are for accelerators")),
        Contender("LoRAFusion", _lorafusion, "dense", "one", None, "lorafusion",
                  why_not=_needs("lorafusion", otherwise="it has no release on PyPI")),
        Contender("axolotl ScatterMoE-LoRA", _axolotl, "dense", "one", None, "axolotl",
                  why_not=_needs("axolotl.integrations.kernels.libs.scattermoe_lora",
                                 otherwise="0.21.0 needs Python 3.12 and pins its own stack")),
    ]  # fmt: skip
