"""Soft targets: where the teacher is right, kept in a file, and their place in the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from synthetic import small_whisper
from torch import nn

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.data.corpora import Utterance
from saml_models.models.interface import QUANTISED_MARGIN
from saml_models.models.registry import bind
from saml_models.training import teacher as module
from saml_models.training.batches import BatchMaker, Sample, SoftTargets
from saml_models.training.objective import Objective
from saml_models.training.options import TrainingOptions
from saml_models.training.pretrain import pretrain
from saml_models.training.teacher import taught

VOCABULARY = 32
CONFIG = SAMLConfig(num_experts=2, rank=2, dropout=0.0, balance=0.0)
PLAIN = TrainingOptions(speeds=(1.0,), margins=(1.0,), freq_masks=0, time_masks=0)


class Teacher:
    """Says at each token what `logits` holds, and counts the clips."""

    def __init__(self, margin: float | None = None) -> None:
        self.network, self.asked, self.margin = nn.Linear(2, 2), 0, margin
        self.heard_in: set[float] = set()
        self.logits = torch.randn(5, VOCABULARY)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.network.eval()
        yield
        self.network.train()

    def token_ids(self, text: str, language: str | None) -> tuple[list[int], int]:
        return [30, 31, *(int(word) for word in text.split())], 2

    def text_logits(self, clip: Any, tokens: list[int], prompt: int, margin: float) -> torch.Tensor:
        assert not self.network.training
        self.asked += 1
        self.heard_in.add(margin)
        return self.logits[: len(tokens) - prompt]


def clips(*texts: str) -> list[Sample]:
    return [Sample(lambda: np.zeros(16000, np.float32), 1.0, text) for text in texts]


def test_only_what_the_teacher_has_right_is_kept() -> None:
    teacher: Any = Teacher()
    likeliest = teacher.logits.argmax(dim=-1).tolist()
    text = [likeliest[0], (likeliest[1] + 1) % VOCABULARY, likeliest[2]]
    (sample,) = taught(teacher, clips(" ".join(map(str, text))), 0.5)
    soft = sample.teacher
    assert soft is not None and soft.ids.shape == (3, module.LIKELIEST)
    assert not soft.shares[1].any()
    expected = teacher.logits[[0, 2]].softmax(dim=-1).topk(module.LIKELIEST)
    np.testing.assert_array_equal(soft.ids[[0, 2]], expected.indices)
    np.testing.assert_allclose(soft.shares[[0, 2]], expected.values / 2, rtol=1e-3)


@pytest.mark.parametrize(("own", "given"), [(None, QUANTISED_MARGIN), (2.0, 2.0)])
def test_a_teacher_hears_in_the_windows_it_knows(own: float | None, given: float) -> None:
    teacher: Any = Teacher(own)
    taught(teacher, clips("1 2", "3"), 0.5)
    assert teacher.heard_in == {given}


def test_answers_are_kept_and_a_killed_run_asks_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    teacher: Any = Teacher()
    path, speech = tmp_path / "teacher.safetensors", clips("1 2", "3", "4 5 6 7")

    def killed(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taught(teacher, speech, 0.5, path, killed)
    samples = taught(teacher, speech, 0.5, path)
    assert teacher.asked == 3
    for one, other in zip(samples, taught(teacher, speech, 0.5), strict=True):
        assert one.teacher is not None and other.teacher is not None
        np.testing.assert_array_equal(one.teacher.shares, other.teacher.shares)
        np.testing.assert_array_equal(one.teacher.ids, other.teacher.ids)
    taught(teacher, speech[:2], 0.5, path)  # other clips: the file is of no use to them
    assert teacher.asked == 8
    path.write_bytes(path.read_bytes()[:-9])  # damaged: asked again
    taught(teacher, speech[:2], 0.5, path)
    assert teacher.asked == 10


def test_the_loss_is_cross_entropy_with_the_mixed_distribution(tiny_en: Any) -> None:
    network = small_whisper(vocabulary=51864)
    apply_saml(network, CONFIG)
    speech = bind(network, tiny_en[1])
    texts, rng = ("Yes.", "No, thank you."), np.random.default_rng(0)
    samples = []
    for text in texts:
        tokens, prompt = speech.token_ids(text)
        ids = rng.integers(0, 51864, (len(tokens) - prompt, 3))
        soft = SoftTargets(ids, rng.random(ids.shape, dtype=np.float32) / 4)
        noise = rng.standard_normal(16000).astype(np.float32)
        samples.append(Sample(lambda noise=noise: noise, 1.0, text, teacher=soft))
    batch = BatchMaker(speech, samples, PLAIN)(0, [0, 1])
    found = Objective(speech, PLAIN)(batch)

    logits = speech.outputs(batch.features, batch.mask, batch.inputs, batch.kept).logits
    rows = []
    for sample in samples:
        assert sample.teacher is not None
        tokens, prompt = speech.token_ids(sample.text)
        for token, ids, shares in zip(
            tokens[prompt:], sample.teacher.ids, sample.teacher.shares, strict=True
        ):
            row = torch.zeros(51864)
            row[token] = 1 - float(shares.sum())
            row.index_put_((torch.tensor(ids),), torch.tensor(shares), accumulate=True)
            rows.append(row)
    torch.testing.assert_close(found, F.cross_entropy(logits, torch.stack(rows)))


def test_refusals() -> None:
    teacher: Any = Teacher()
    with pytest.raises(SAMLError, match=r"share of 1\.5; give one from 0 to 1"):
        taught(teacher, clips("1"), 1.5)
    network = small_whisper(vocabulary=51864)
    apply_saml(network, CONFIG)
    clip = Utterance("one", "a", "yes", Path("one.wav"), samples=np.zeros(16000, np.float32))
    with pytest.raises(SAMLError, match="give original, the full-precision model"):
        pretrain(network, None, [clip], TrainingOptions(teacher=0.5))
