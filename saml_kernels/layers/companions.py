"""Layers that read the same x, in one launch for a few tokens."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saml_kernels.backends.triton import configs
from saml_kernels.ops.call import eager
from saml_kernels.ops.together import MEMBERS, Together

__all__ = ["Companions"]

MOST_ROWS = 256  # more are no few tokens on any device
PATIENCE = 3  # times in a row that some result was not asked for
REMEMBERED = 256  # shapes


class Companions:
    """Two or three layers; whoever is called first with an x runs all of them.

    The layers are held weakly, and so is the x whose results wait to be asked for.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        """See `of`."""
        self.layers = [weakref.ref(layer) for layer in layers]
        # What waits to be asked for: x, its version, results by the identity of their layer. In
        # one piece, for the sake of threads.
        self.waiting: tuple[weakref.ref[Tensor], int, dict[int, Tensor]] | None = None
        self.unasked = 0
        self.plans: dict[torch.Size, Together] = {}
        self.changes = configs.changes

    @classmethod
    def of(cls, layers: Sequence[Any]) -> bool:
        """Make `layers` each other's; whether they can be. See `SAMLLinear.together`."""
        if not 2 <= len(layers) <= MEMBERS or len({id(layer) for layer in layers}) < len(layers):
            return False
        kinds = {
            (n.weight.shape, n.weight.format, n.weight.block_size, n.lora_a.shape, n.config)
            for n in layers
        }
        of_tokens = layers[0].config.router == "token" or not len(layers[0].lora_a)
        if len(kinds) > 1 or not of_tokens:
            return False
        made = cls(layers)
        for layer in layers:
            layer.companions = made
        return True

    def __deepcopy__(self, memo: Any) -> None:
        """None: a copied layer is on its own."""

    def __reduce__(self) -> Any:
        """None, for the same reason."""
        return type(None), ()

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """y of `layer` for x; None where it has to be computed alone."""
        waiting = self.waiting
        if waiting is not None and waiting[2]:
            of, version, found = waiting
            y = found.pop(id(layer), None) if of() is x and version == _version(x) else None
            if y is not None:
                self.unasked = 0
                return y
            self.waiting = None
            self.unasked += 1
            if self.unasked >= PATIENCE:  # they do not read the same x after all
                self._part()
                return None
        if layer.weight.prepared is None:  # no GPU, or a first call
            return None
        if self.changes != configs.changes or len(self.plans) > REMEMBERED:
            self.plans.clear()
            self.changes = configs.changes
        known = self.plans.get(x.shape)
        if known is not None and not known.possible:
            return None
        if not 0 < x.numel() <= MOST_ROWS * x.shape[-1] or not eager(x):
            return None
        return self._run(layer, x, known)

    def _run(self, layer: Any, x: Tensor, known: Together | None) -> Tensor | None:
        layers: list[Any] = [reference() for reference in self.layers]
        calls, kinds = [], []
        for other in layers:
            ready = None if other is None else other.weight.prepared
            given = None if ready is None else other.arguments(x)
            # Each is prepared by its own first call.
            if ready is None or given is None or x.device != ready.device:
                return None
            tensors = given[:4]
            if not ready.holds(*given) or not ready.serves(x, *tensors[2:]):
                return None
            calls.append(tensors)
            kinds.append(ready.kind(x, *tensors, None, False))
        if known is None or not known.of(kinds):
            known = self.plans[x.shape] = Together(kinds, calls)
        if not known.possible:
            return None
        results = known(x, kinds, calls)
        found = {id(n): y for n, y in zip(layers, results, strict=True)}
        mine = found.pop(id(layer))
        self.waiting = (weakref.ref(x), _version(x), found)
        return mine

    def _part(self) -> None:
        for reference in self.layers:
            layer = reference()
            if layer is not None and layer.companions is self:
                layer.companions = None


def _version(x: Tensor) -> int:
    """How often x was written to; nobody counts for inference tensors."""
    return 0 if x.is_inference() else x._version
