"""A call checked once for its layer: everything that the next call would find out again.

Compiled kernels and their arguments are chosen by shape (plan.py); what a layer keeps is which plan
serves which input, and the tensors that a plan is started with. It is dropped when one of those
tensors is replaced or lies elsewhere (an optimiser's step in place changes neither), and never
copied or saved with the layer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from saml_kernels.backends.reference import Gating, Gradients
from saml_kernels.backends.triton import configs
from saml_kernels.backends.triton.backend import DTYPES, expert_parts, facts_of
from saml_kernels.backends.triton.facts import Facts, weight_parts
from saml_kernels.backends.triton.launcher import on_device
from saml_kernels.backends.triton.plan import backward_plan, forward_plan
from saml_kernels.backends.triton.signature import ALIGNMENT
from saml_kernels.cuda import keep
from saml_kernels.ops.arguments import autocast_dtype, check, span
from saml_kernels.ops.autograd import Operator, learning
from saml_kernels.quantization.tensor import QuantizedTensor

__all__ = ["Kind", "Prepared"]

MOST_SHAPES = 256  # inputs that a layer remembers
READABLE = (*DTYPES, torch.int8)
Experts = Tensor | QuantizedTensor


class Prepared:
    """The operator on one layer's tensors.

    Attributes:
        device: where they lie.
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        lora_a: Experts,
        lora_b: Experts,
        gates: Tensor,
        bias: Tensor | None,
        scaling: float,
        gating: Gating | None,
    ) -> None:
        """The arguments, already checked; `gates` counts only as a router's weight."""
        # Weakly: a cycle would keep a dropped layer's memory until the collector comes by.
        self.weight, self.settings = weakref.ref(weight), (scaling, gating)
        self.scaling, self.gating = float(scaling), gating
        self.device = weight.codes.device
        self.parts, self.buffers = weight_parts(weight), weight._buffers
        # Scales are made of these: what is written to them is followed.
        watched = (
            (weight.absmax, weight.nested_absmax, weight.offset) if weight.double_quant else ()
        )
        self.watched = tuple(t for t in watched if t is not None and not t.is_inference())
        self.version = sum(t._version for t in self.watched)
        self.none = 0 in lora_a.shape[-3:-1]
        self.tensors = self._tensors(lora_a, lora_b, gates, bias)
        self.eight_bit = isinstance(lora_a, QuantizedTensor)
        self.readable = all(t is None or t.dtype in READABLE for t in self.tensors[4:])
        self.places = [None if t is None else (t.data_ptr(), t.dtype) for t in self.tensors]
        self.shapes = lora_a.shape, lora_b.shape, gates.shape  # `.data` can be narrowed in place
        self.changes = configs.changes
        self.calls: dict[Any, Kind] = {}
        self.biases: dict[torch.dtype, tuple[int, Tensor]] = {}  # cast, and of which version

    def __deepcopy__(self, memo: Any) -> None:
        """None: a copied layer is prepared anew."""

    def __reduce__(self) -> Any:
        """None, for the same reason."""
        return type(None), ()

    def _tensors(
        self, lora_a: Experts, lora_b: Experts, gates: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        parts: Any = self.buffers
        experts: tuple[Tensor | None, ...] = (None, None, None)
        if not self.none:
            codes = (expert_parts(t)[0] for t in (lora_a, lora_b))
            experts = (*codes, gates if self.gating else None)
        return (
            parts["codes"], parts["absmax"], parts["nested_absmax"], parts["offset"],
            *experts, bias,
        )  # fmt: skip

    def holds(
        self,
        lora_a: Experts,
        lora_b: Experts,
        gates: Tensor,
        bias: Tensor | None,
        scaling: float,
        gating: Gating | None,
    ) -> bool:
        """Whether it was made for these very tensors, which lie where they lay."""
        if (scaling, gating) != self.settings or self.changes != configs.changes:
            return False
        if self.none != (0 in lora_a.shape[-3:-1]):
            return False
        shapes = self.shapes if gating is not None else self.shapes[:2]
        if (lora_a.shape, lora_b.shape, gates.shape)[: len(shapes)] != shapes:
            return False
        version = sum([t._version for t in self.watched])
        if version != self.version:
            weight = self.weight()
            assert weight is not None
            self.version = version
            weight.kernel_scales()
        given = self._tensors(lora_a, lora_b, gates, bias)
        for own, place, tensor in zip(self.tensors, self.places, given, strict=True):
            if own is not tensor:
                return False
            if place is not None and (tensor.data_ptr(), tensor.dtype) != place:  # type: ignore[union-attr]
                return False
        return True

    def serves(self, *inputs: Tensor | None) -> bool:
        """Whether the kernels can be given these tensors; `inputs` are those that vary."""
        return self.readable and not (self.eight_bit and learning(*inputs))

    def __call__(
        self,
        x: Tensor,
        lora_a: Experts,
        lora_b: Experts,
        gates: Tensor,
        bias: Tensor | None,
        speakers: Tensor | None,
    ) -> Tensor:
        """y [..., N].

        Raises:
            SAMLError: x, given gates or the speaker index do not fit.
        """
        experts = () if self.eight_bit else (lora_a, lora_b)
        wanted = learning(x, gates, bias, *experts)  # type: ignore[arg-type]
        kind = self.kind(x, lora_a, lora_b, gates, bias, speakers, wanted)
        if wanted:
            return Operator.apply(x, lora_a, lora_b, gates, bias, _Bound(kind, speakers))
        return kind.forward(x, lora_a, lora_b, gates, bias, speakers)[0]

    def kind(
        self,
        x: Tensor,
        lora_a: Experts,
        lora_b: Experts,
        gates: Tensor,
        bias: Tensor | None,
        speakers: Tensor | None,
        wanted: bool,
    ) -> Kind:
        """What a call with such tensors is; `wanted` says that its gradients are.

        Raises:
            SAMLError: x, given gates or the speaker index do not fit.
        """
        dtype = autocast_dtype(x) or x.dtype
        key = [x.shape, x.dtype, dtype, wanted, _remainder(x)]
        if dtype == torch.float32:
            key.append(torch.backends.cuda.matmul.fp32_precision)
        if self.gating is None:
            key += (gates.shape, gates.dtype, _remainder(gates))
        if speakers is not None:
            key += (speakers.shape, speakers.dtype, _remainder(speakers))
        kind = self.calls.get(tuple(key))
        if kind is None:
            if len(self.calls) >= MOST_SHAPES:
                self.calls.clear()
            kind = Kind(self, x, lora_a, lora_b, gates, bias, speakers, dtype, wanted)
            self.calls[tuple(key)] = kind
        return kind


def _remainder(tensor: Tensor) -> int | None:
    """Of its address; None of one that is copied before a kernel sees it."""
    return tensor.data_ptr() % ALIGNMENT if tensor.is_contiguous() else None


class Kind:
    """Calls of one layer with inputs of one shape, dtype and alignment.

    With `keep` they leave P and the gates for a backward.
    """

    def __init__(
        self,
        layer: Prepared,
        x: Tensor,
        lora_a: Experts,
        lora_b: Experts,
        gates: Tensor,
        bias: Tensor | None,
        speakers: Tensor | None,
        dtype: torch.dtype,
        keep: bool,
    ) -> None:
        cast = None if dtype == x.dtype else dtype
        weight = layer.weight()
        assert weight is not None  # it holds the layer
        check(x, weight, lora_a, lora_b, gates, bias, speakers, layer.gating, cast)
        self.parts, self.device, self.dtype = layer.parts, layer.device, dtype
        self.scaling, self.gating = layer.scaling, layer.gating
        lead = x.shape[:-1]
        self.shape = (*lead, weight.shape[0])
        self.gates_span = self.speakers_span = 1
        self.spread_gates = self.spread_speakers = False
        if layer.gating is None and not layer.none:
            found = span(gates.shape[:-1], lead)
            self.spread_gates, self.gates_span = found is None, found or 1
        if speakers is not None:
            found = span(speakers.shape, lead)
            self.spread_speakers, self.speakers_span = found is None, found or 1
        self.lead = lead
        x, gates, speakers = self.given(x, gates, speakers)
        spans = (self.gates_span, self.speakers_span)
        self.facts: Facts = facts_of(
            x, weight, lora_a, lora_b, gates, bias, speakers, layer.gating,
            spans=spans, dtype=dtype,
        )  # fmt: skip
        self.plan = forward_plan(self.facts, keep)
        self.casts_bias = self.plan.route == "scratch" and bias is not None and bias.dtype != dtype
        self.biases = layer.biases
        self.backward_facts: dict[bool, Facts] = {}

    def given(
        self, x: Tensor, gates: Tensor, speakers: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the kernels are given: contiguous, broadcast where entries do not lie in a row."""
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if not x.is_contiguous():
            x = x.contiguous()
        if self.spread_gates:
            gates = gates.expand(*self.lead, gates.shape[-1])
        if not gates.is_contiguous():
            gates = gates.contiguous()
        if speakers is not None:
            if self.spread_speakers:
                speakers = speakers.expand(self.lead)
            if speakers.dtype != torch.int32:
                speakers = speakers.to(torch.int32)
            if not speakers.is_contiguous():
                speakers = speakers.contiguous()
        return x, gates, speakers

    def forward(
        self,
        x: Tensor,
        lora_a: Experts,
        lora_b: Experts,
        gates: Tensor,
        bias: Tensor | None,
        speakers: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """y [..., N], and what the backward wants kept."""
        x, gates, speakers = self.given(x, gates, speakers)
        if self.casts_bias and bias is not None:
            bias = self._cast(bias)
        with on_device(self.device):
            y, plain, made = self.plan(
                x, self.parts, *expert_parts(lora_a), *expert_parts(lora_b), gates, bias, speakers,
                self.scaling,
            )  # fmt: skip
        return y.view(self.shape), (x, plain, made, speakers)

    def _cast(self, bias: Tensor) -> Tensor:
        """The bias in the type that cuBLAS wants, cast again where it was changed in place."""
        if bias.is_inference():  # which counts no versions
            return bias.to(self.dtype)
        found = self.biases.get(self.dtype)
        if found is not None and found[0] == bias._version:
            keep(found[1])
            return found[1]
        cast = bias.detach().to(self.dtype)
        if not (cast.is_cuda and torch.cuda.is_current_stream_capturing()):  # it has no values yet
            self.biases[self.dtype] = bias._version, cast
        return cast


class _Bound:
    """A call of a kind with its speaker index, for `Operator`."""

    __slots__ = ("kind", "speakers", "x_dtype")

    def __init__(self, kind: Kind, speakers: Tensor | None) -> None:
        self.kind, self.speakers = kind, speakers

    def forward(
        self, x: Tensor, lora_a: Tensor, lora_b: Tensor, gates: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        self.x_dtype = x.dtype
        return self.kind.forward(x, lora_a, lora_b, gates, bias, self.speakers)

    def backward(
        self,
        dy: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        gates: Tensor,
        kept: tuple[Tensor | None, ...],
        needs: tuple[bool, bool, bool, bool],
    ) -> Gradients:
        kind = self.kind
        x, plain, made, speakers = kept
        assert x is not None
        if dy.dtype != kind.dtype:
            dy = dy.to(kind.dtype)
        if not dy.is_contiguous():
            dy = dy.contiguous()
        _, given, _ = kind.given(x, gates, None)
        aligned = dy.data_ptr() % ALIGNMENT == 0
        dx_dtype = None if self.x_dtype == kind.dtype else self.x_dtype
        facts = kind.backward_facts.get(aligned)
        if facts is None:
            mine = kind.facts
            # Whatever a kernel is given has to be told apart: plans are shared by all layers.
            facts = mine._replace(bias=False, kinds=(*mine.kinds, dx_dtype, aligned))
            kind.backward_facts[aligned] = facts
        plan = backward_plan(facts, needs, plain is not None)
        with on_device(kind.device):
            dx, da, db, dg = plan(
                dy, x, kind.parts, lora_a, lora_b, given, speakers, kind.scaling, plain, made,
                dx_dtype,
            )  # fmt: skip
        if dx is not None:
            dx = dx.view(x.shape)
        if dg is not None and kind.gating is None:
            if kind.gates_span > 1:
                dg = dg.view(-1, kind.gates_span, dg.shape[-1]).sum(1).to(gates.dtype)
            elif kind.spread_gates:
                dg = dg.view(*kind.lead, gates.shape[-1]).sum_to_size(gates.shape)
            dg = dg.view(gates.shape)
        return dx, da, db, dg
