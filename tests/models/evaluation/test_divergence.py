"""Divergence of next-token distributions: against plain arithmetic, and of real models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.data.corpora import load_corpus
from saml_models.evaluation.divergence import Divergence, divergences
from saml_models.models.registry import bind
from saml_models.text.wer import over_speakers


def test_sums_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    found, expected, agreed = Divergence(), [], []
    for length in (3, 7):
        full, other = (torch.randn(length, 11, generator=generator) for _ in range(2))
        found.add(full, other)
        p, q = full.double().softmax(-1), other.double().softmax(-1)
        expected.append(float((p * (p / q).log()).sum()))
        agreed.append(int((p.argmax(-1) == q.argmax(-1)).sum()))
    assert found.kl == pytest.approx(expected, abs=1e-5)
    assert (found.tokens, found.agreed) == ([3, 7], agreed)
    assert found.mean == pytest.approx(sum(expected) / 10, abs=1e-5)
    assert found.agreement == sum(agreed) / 10


def test_interval_is_over_speakers() -> None:
    one = Divergence([1.0, 1.0, 3.0, 3.0], [10] * 4, [5] * 4)
    assert one.interval(["a", "a", "b", "b"]) == over_speakers("ab", [2.0, 6.0], [20, 20])[1:]
    assert one.interval(["a"] * 4) == one.interval(["a", "b", "c", "d"])  # of one, over clips


@pytest.fixture(scope="module")
def spoken(speech_root: Any) -> Any:
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])
    return sorted(found, key=lambda u: len(u.load()))[:2]


def test_rounding_is_seen(tiny_en: Any, spoken: Any) -> None:
    full = bind(*tiny_en)
    coarse, fine = copy.deepcopy(tiny_en[0]), copy.deepcopy(tiny_en[0])
    apply_saml(coarse, SAMLConfig(num_experts=0, format="nf4"))
    apply_saml(fine, SAMLConfig(num_experts=0, format="int8"))
    clips, texts = [u.load() for u in spoken], [u.text.capitalize() for u in spoken]
    models = [full, bind(fine, tiny_en[1]), bind(coarse, tiny_en[1])]
    done: list[int] = []
    same, eight, four = divergences(full, models, clips, texts, margin=10.0, on_done=done.append)
    assert same.mean == 0 and same.agreement == 1
    assert 0 < eight.mean < 0.2 * four.mean
    assert four.tokens == same.tokens and len(done) == len(clips)
    whole = divergences(full, models[2:], clips, texts)[0]
    assert whole.kl != four.kl


def test_nothing_to_compare(tiny_en: Any) -> None:
    with pytest.raises(SAMLError, match="no clips"):
        divergences(bind(*tiny_en), [], [], [])
    assert np.isfinite(Divergence([0.0], [1], [1]).mean)
