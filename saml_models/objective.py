"""What training makes small: cross entropy, and what the options add to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_models.batches import IGNORED, Batch
from saml_models.families import Family, Outputs
from saml_models.flat_start import flat_loss
from saml_models.surgery import routers_of

if TYPE_CHECKING:
    from saml_models.training import TrainingOptions

__all__ = ["Objective", "trained_parameters"]


class Objective(nn.Module):
    """The loss as one module, so that accelerate can wrap it for several processes."""

    def __init__(
        self, model: nn.Module, family: Family, options: TrainingOptions, teacher: nn.Module | None
    ) -> None:
        """Of a model of that family; `teacher` is the full-precision one, where one distils."""
        super().__init__()
        self.model, self.family, self.options = model, family, options
        # In a tuple: a teacher is nobody's submodule, so that nothing of it is trained or saved.
        self.teacher = (teacher,)
        self.parameters_trained = trained_parameters(model)
        self.start = {n: p.detach().clone() for n, p in self.parameters_trained.items()}

    def forward(self, batch: Batch, flat: bool = False) -> Tensor:
        """The loss of one batch (scalar); `flat`: this step belongs to the flat start."""
        o, model, family = self.options, self.model, self.family
        routing: Any = getattr(model, "saml_routing", None)
        if routing is not None:
            routing.mask = family.routing_mask(model, batch.mask)
        asked = batch.mask, batch.inputs, batch.kept
        found = family.outputs(model, batch.features, *asked)
        targets = batch.targets.flatten()[batch.kept]
        loss = F.cross_entropy(
            found.logits, targets, ignore_index=IGNORED, label_smoothing=o.smoothing
        )
        (teacher,) = self.teacher
        if teacher is not None and o.distil > 0:
            with torch.no_grad():
                wanted = family.outputs(teacher, batch.clean, *asked).logits.softmax(-1)
            apart = F.kl_div(found.logits.log_softmax(-1), wanted, reduction="none").sum(-1)
            real = targets != IGNORED
            apart = (apart * real).sum() / real.sum()
            loss = (1 - o.distil) * loss + o.distil * apart
        if found.ctc is not None and o.ctc > 0:
            rows = zip(batch.targets, batch.words, strict=True)
            words = [row[begin:end] for row, (begin, end) in rows]
            if flat:
                heard = flat_loss(found, family.bands(batch.clean), batch.mask, words)
            else:
                heard = _ctc_loss(found, words)
            loss = (1 - o.ctc) * loss + o.ctc * heard
        if routing is not None:
            balance = routing.balance_loss()
            routing.mask = None
            if balance is not None:
                loss = loss + model.saml_config.balance * balance  # type: ignore[union-attr]
        if o.anchor:
            for name, parameter in self.parameters_trained.items():
                loss = loss + o.anchor * (parameter - self.start[name]).square().sum()
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
