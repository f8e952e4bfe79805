"""Joint CTC and attention: the encoder's own text, and the choice between texts by both scores.

Source: Watanabe et al., Hybrid CTC/attention architecture (2017), rescoring form (section IV-B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saml_models.models.own_words import OwnWords

__all__ = ["CTC_WEIGHT", "best_of", "ctc_greedy"]

CTC_WEIGHT = 0.5


def ctc_greedy(ctc: Tensor, frames: Tensor, blank: int) -> list[list[int]]:
    """The most likely token of each frame, repeats and blanks left out.

    Args:
        ctc: [B, T, V] log-probabilities.
        frames: [B], how many hold audio.
        blank: the token that says nothing.
    """
    sequences = []
    for row, length in zip(ctc.argmax(-1), frames.tolist(), strict=True):
        tokens = row[:length].unique_consecutive()
        sequences.append(tokens[tokens != blank].tolist())
    return sequences


def best_of(
    candidates: Sequence[Sequence[list[int]]],
    model: Any,
    encoded: Any,
    ctc: Tensor,
    frames: Tensor,
    prompt: list[int],
    own_words: OwnWords | None = None,
    weight: float = CTC_WEIGHT,
) -> list[list[int]]:
    """For each clip, the text with the best weighted sum of both branches' log-probabilities.

    Args:
        candidates: token ids without prompt and end, as many for each of B clips.
        model: a Conformer with a CTC head.
        encoded: its encoder's output for the B clips.
        ctc: [B, T, V] log-probabilities.
        frames: [B], how many of T hold audio.
        prompt: what each text begins with.
        own_words: whose bonus a text that holds some has here too.
        weight: CTC's share.
    """
    many = len(candidates[0])
    texts = [text for row in candidates for text in row]
    end, blank = model.config.eos_token_id, model.config.pad_token_id
    device = ctc.device
    whole = [torch.tensor([*prompt, *text, end]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=end).to(device)
    lengths = torch.tensor([len(t) for t in texts], device=device)
    hidden = model.get_decoder()(
        input_ids=ids[:, :-1],
        encoder_hidden_states=encoded.last_hidden_state.repeat_interleave(many, 0),
        encoder_attention_mask=encoded.attention_mask.repeat_interleave(many, 0),
        use_cache=False,
    ).last_hidden_state
    decoder_scores = (
        model.proj_out(hidden).float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    )
    position = torch.arange(decoder_scores.shape[1], device=device)
    inside = (position >= len(prompt) - 1) & (position < len(prompt) + lengths[:, None])
    attention = (decoder_scores * inside).sum(-1)
    ctc_scores = -F.ctc_loss(
        ctc.repeat_interleave(many, 0).transpose(0, 1),
        ids[:, len(prompt) :],
        frames.repeat_interleave(many, 0),
        lengths,
        blank,
        reduction="none",
    )
    scores = (1 - weight) * attention + weight * ctc_scores
    if own_words is not None:
        scores = scores + scores.new_tensor([own_words.worth(text) for text in texts])
    best = scores.view(-1, many).argmax(-1).tolist()
    return [list(row[i]) for row, i in zip(candidates, best, strict=True)]
