"""The text spread evenly over the speech, which a CTC head learns before it can align."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from saml_models.batches import plan_batches
from saml_models.families import Outputs
from saml_models.flat_start import SHORT, flat_loss, spread
from saml_models.training import TrainingOptions

BLANK = 0


@given(
    quiet=st.tuples(st.integers(5, 9), st.integers(5, 9)),  # together more than a tenth
    many=st.integers(1, 12),
    each=st.integers(1, 5),
)
def test_every_token_has_its_share_of_the_speech_and_no_quiet_frame(
    quiet: tuple[int, int], many: int, each: int
) -> None:
    before, after = quiet
    speech = many * each + 2
    loudness = torch.cat([torch.zeros(before), torch.ones(speech), torch.zeros(after)])
    text = torch.arange(1, many + 1)
    found = spread(loudness, text, BLANK)
    assert (found[:before] == BLANK).all() and (found[before + speech :] == BLANK).all()
    said = found[before : before + speech]
    assert torch.equal(said, said.sort().values)
    counts = torch.bincount(said, minlength=many + 1)[1:]
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1


def test_no_text_is_blanks_and_one_loudness_is_all_speech() -> None:
    text = torch.tensor([5, 6])
    assert spread(torch.full((6,), 0.3), text, BLANK).tolist() == [5, 5, 5, 6, 6, 6]
    assert (spread(torch.rand(7), text[:0], BLANK) == BLANK).all()


def test_padding_counts_for_nothing_and_the_even_text_costs_least() -> None:
    torch.manual_seed(0)
    lengths, frames = [24, 12], [12, 6]
    bands = torch.randn(2, 8, 24)
    heard = torch.arange(24) < torch.tensor(lengths)[:, None]
    words = [torch.tensor([3, 4, 5]), torch.tensor([6])]

    def loss(scores: torch.Tensor, bands: torch.Tensor) -> float:
        found = Outputs(scores[:, 0], scores.log_softmax(-1), torch.tensor(frames), BLANK)
        return flat_loss(found, bands, heard, words).item()

    scores = torch.randn(2, 12, 7)
    other, loud = scores.clone(), bands.clone()
    other[1, 6:], loud[1, :, 12:] = 100.0, 1e4
    assert loss(other, loud) == loss(scores, bands)
    best = torch.zeros_like(scores)
    for row, (length, text) in enumerate(zip(lengths, words, strict=True)):
        loudness = bands[row, :, :length].mean(0).view(-1, 2).mean(-1)
        for t, token in enumerate(spread(loudness, text, BLANK).tolist()):
            best[row, t, token] = 20.0
    assert loss(best, bands) < 1e-3 < loss(scores, bands)


def test_only_short_clips_take_part() -> None:
    seconds = [1.0, 7.0, 3.0, 30.0, 5.9, 6.1]
    found = plan_batches(seconds, TrainingOptions(epochs=3), longest=SHORT)
    assert sorted(i for batch in found for i in batch) == sorted([0, 2, 4] * 3)
    assert plan_batches([9.0], TrainingOptions(epochs=2), longest=SHORT) == []
