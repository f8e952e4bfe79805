"""What training makes small: cross entropy, and what the options add to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_models.compress.layers import routers_of
from saml_models.models.interface import Family, Outputs
from saml_models.training.batches import IGNORED, Batch

if TYPE_CHECKING:
    from saml_models.training.options import TrainingOptions

__all__ = ["Objective", "trained_parameters"]


class Objective(nn.Module):
    """The loss as one module, so that accelerate can wrap it for several processes."""

    def __init__(self, model: nn.Module, family: Family, options: TrainingOptions) -> None:
        """Of a model of that family."""
        super().__init__()
        self.model, self.family, self.options = model, family, options
        self.parameters_trained = trained_parameters(model)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of one batch (scalar)."""
        o, model, family = self.options, self.model, self.family
        routing: Any = getattr(model, "saml_routing", None)
        if routing is not None:
            routing.mask = family.routing_mask(model, batch.mask)
        found = family.outputs(model, batch.features, batch.mask, batch.inputs, batch.kept)
        targets = batch.targets.flatten()[batch.kept]
        loss = F.cross_entropy(found.logits, targets, ignore_index=IGNORED)
        if found.ctc is not None and o.ctc > 0:
            rows = zip(batch.targets, batch.words, strict=True)
            words = [row[begin:end] for row, (begin, end) in rows]
            loss = (1 - o.ctc) * loss + o.ctc * _ctc_loss(found, words)
        if routing is not None:
            balance = routing.balance_loss()
            routing.mask = None
            if balance is not None:
                loss = loss + model.saml_config.balance * balance  # type: ignore[union-attr]
        return loss


def _ctc_loss(found: Outputs, words: list[Tensor]) -> Tensor:
    """Per token of the text, as the cross entropy is."""
    assert found.ctc is not None and found.ctc_lengths is not None
    lengths = torch.tensor([len(row) for row in words], device=found.ctc_lengths.device)
    total = F.ctc_loss(
        found.ctc.transpose(0, 1), torch.cat(words), found.ctc_lengths, lengths, found.blank,
        reduction="sum", zero_infinity=True,
    )  # fmt: skip
    return total / lengths.sum().clamp(min=1)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """By name, what `fit` changes: experts and routers, routers' offsets, or a plain model."""
    found: dict[str, Tensor] = {
        n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()
    }
    for name, router in routers_of(model).items():
        if router.offset is not None and router.offset.requires_grad:
            found[f"{name}.offset"] = router.offset
    return found
