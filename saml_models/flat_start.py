"""A flat start: before CTC can align a text, the text is spread evenly over the speech.

Source: how Kaldi's first monophone models are aligned (align-equal, Povey et al., 2011). CTC alone
(arXiv 1609.06773) spends thousands of steps saying nothing but blanks on a few hours of speech.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_models.families import Outputs

__all__ = ["SHORT", "flat_loss"]

SHORT = 6.0  # seconds; an even spread is far off in a longer clip
IGNORED = -1
QUIET = 0.3  # of the way from a clip's quiet frames to its loud ones


def flat_loss(found: Outputs, bands: Tensor, heard: Tensor, words: list[Tensor]) -> Tensor:
    """Cross entropy per frame between the CTC head and the evenly spread text.

    Args:
        found: of the model, with `ctc` [B, T', V].
        bands: [B, mel bins, T], without SpecAugment.
        heard: [B, T] bool, True where there is audio.
        words: B texts, [L] token ids each.
    """
    assert found.ctc is not None and found.ctc_lengths is not None
    wanted = torch.full(found.ctc.shape[:2], IGNORED, device=found.ctc.device)
    for row, text in enumerate(words):
        frames = int(found.ctc_lengths[row])
        loudness = bands[row, :, heard[row]].mean(0, keepdim=True)
        wanted[row, :frames] = spread(F.adaptive_avg_pool1d(loudness, frames)[0], text, found.blank)
    return F.nll_loss(found.ctc.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)


def spread(loudness: Tensor, text: Tensor, blank: int) -> Tensor:
    """A token for each frame [T]: blanks where it is quiet [T], the text [L] over the rest."""
    low, high = loudness.quantile(0.1), loudness.quantile(0.9)
    speech = loudness >= low + QUIET * (high - low)
    if not len(text):
        return torch.full_like(speech, blank, dtype=torch.long)
    done = (speech.cumsum(0) - 0.5) / speech.sum()
    place = (done * len(text)).long().clamp(0, len(text) - 1)
    return text[place].where(speech, blank)
