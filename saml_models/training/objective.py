"""What training makes small: cross entropy, and what the options add to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_models.compress.layers import compression_of
from saml_models.models.interface import Outputs, SpeechModel
from saml_models.training.batches import IGNORED, Batch

if TYPE_CHECKING:
    from saml_models.training.options import TrainingOptions

__all__ = ["Objective", "router_offsets", "trained_parameters"]


class Objective(nn.Module):
    """The loss as one module, so that accelerate can wrap it for several processes."""

    def __init__(self, speech: SpeechModel, options: TrainingOptions) -> None:
        super().__init__()
        self.speech, self.options = speech, options
        self.network = speech.network  # a submodule: what accelerate finds parameters in
        self.parameters_trained = trained_parameters(speech.network)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of one batch (scalar)."""
        o, speech, context = self.options, self.speech, self.speech.context
        with context.batch(speech.encoder_mask(batch.mask), batch.speakers):
            outputs = speech.outputs(batch.features, batch.mask, batch.inputs, batch.kept)
        targets = batch.targets.flatten()[batch.kept]
        loss = F.cross_entropy(outputs.logits, targets, ignore_index=IGNORED)
        if batch.soft_ids.shape[-1]:
            ids, shares = (t.flatten(0, 1)[batch.kept] for t in (batch.soft_ids, batch.soft_shares))
            loss = loss - _soft_gain(outputs.logits, targets, ids, shares)
        if outputs.ctc is not None and o.ctc > 0:
            rows = zip(batch.targets, batch.words, strict=True)
            words = [row[begin:end] for row, (begin, end) in rows]
            loss = (1 - o.ctc) * loss + o.ctc * _ctc_loss(outputs, words)
        balance = context.balance_loss()
        if balance is not None:
            loss = loss + compression_of(self.network).config.balance * balance
        return loss


def _soft_gain(logits: Tensor, targets: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    """By how much cross entropy with a teacher's part in the targets is lower, per token.

    Args:
        logits: float [n, V].
        targets: int64 [n], `IGNORED` where there is none.
        ids, shares: the teacher's tokens int64 and their shares [n, k], 0 where there is no target.
    """
    apart = logits.gather(1, ids) - logits.gather(1, targets.clamp(min=0)[:, None])
    return (shares * apart).sum() / (targets != IGNORED).sum().clamp(min=1)


def _ctc_loss(outputs: Outputs, words: list[Tensor]) -> Tensor:
    """Per token of the text, as the cross entropy is."""
    assert outputs.ctc is not None and outputs.ctc_lengths is not None
    lengths = torch.tensor([len(row) for row in words], device=outputs.ctc_lengths.device)
    total = F.ctc_loss(
        outputs.ctc.transpose(0, 1), torch.cat(words), outputs.ctc_lengths, lengths, outputs.blank,
        reduction="sum", zero_infinity=True,
    )  # fmt: skip
    return total / lengths.sum().clamp(min=1)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """By name, what `fit` changes: experts and routers, routers' offsets, or a plain model."""
    parameters: dict[str, Tensor] = {
        n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()
    }
    return parameters | router_offsets(model)


def router_offsets(model: nn.Module) -> dict[str, Tensor]:
    """By name, the routers' offsets that learn: no parameters of any module."""
    saml: Any = getattr(model, "saml", None)
    routers = {} if saml is None else saml.routers
    found = {f"{name}.offset": router.offset for name, router in routers.items()}
    return {n: t for n, t in found.items() if t is not None and t.requires_grad}
