"""The guard: which clips it holds back, what it decides, and that the model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import small_whisper

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.data.corpora import Utterance, utterances_of
from saml_models.models.registry import bind
from saml_models.training import guard as module
from saml_models.training.adapt import adapt
from saml_models.training.batches import Sample
from saml_models.training.guard import LEAST, MOST, Guard, Verdict, halves
from saml_models.training.objective import trained_parameters
from saml_models.training.options import TrainingOptions

OPTIONS = TrainingOptions(learning_rate=1e-2, epochs=2, max_batch=3, checkpoint_every=1)
TEXTS = ("Yes.", "No.", "One two.", "Three.", "Four five.", "Six.")


@pytest.fixture(scope="module")
def model() -> Any:
    found = small_whisper(vocabulary=51864)
    found.generation_config.no_timestamps_token_id = 50362
    torch.manual_seed(1)
    apply_saml(found, SAMLConfig(num_experts=2, rank=2))
    return found


@pytest.fixture(scope="module")
def utterances() -> list[Utterance]:
    noise = np.random.default_rng(0).normal(0, 0.1, (len(TEXTS), 16000)).astype(np.float32)
    return utterances_of(list(zip(noise, TEXTS, strict=True)))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.saml.experts().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def heard(
    monkeypatch: pytest.MonkeyPatch, losses: list[list[float]], errors: list[int]
) -> tuple[Iterator[list[float]], Iterator[int]]:
    """What the guard hears, in order, unadapted first: nats of each clip, wrong of 40 words."""
    loss, wrong = iter(losses), iter(errors)
    monkeypatch.setattr(Guard, "_losses", lambda own: next(loss))
    monkeypatch.setattr(Guard, "_errors", lambda own: (next(wrong), 40))
    return loss, wrong


def test_every_second_clip_is_held_back() -> None:
    assert halves(5) == ([0, 2, 4], [1, 3])
    learnt, held = halves(100)
    assert len(learnt) == len(held) == MOST and not {*learnt} & {*held}


WAS, LIKELIER, RARER = [4.0, 4.0, 4.0], [3.0, 5.0, 3.7], [4.1, 4.1, 4.2]
PERHAPS = [4.4, 3.5, 4.3]  # more by 0.2, with a standard error of 0.9


@pytest.mark.parametrize(
    ("losses", "errors", "share", "at"),
    [
        ([WAS, LIKELIER], [8, 8], 1.0, 1),
        ([WAS, LIKELIER], [8, 10], 1.0, 1),  # one in twenty words is chance
        ([WAS, PERHAPS, LIKELIER], [8, 8, 9], 0.5, 2),  # half of it makes them likelier
        ([WAS, RARER, PERHAPS], [8, 8, 9], 0.5, 2),  # or it may be chance that it does not
        ([WAS, LIKELIER, LIKELIER], [8, 20, 7], 0.5, 2),  # a loop, which half of it has not
        ([WAS, PERHAPS, RARER], [8, 6, 6], 0.0, 1),
        ([WAS, LIKELIER, LIKELIER], [8, 20, 19], 0.0, 1),
    ],
)
def test_the_largest_share_that_helps_is_used(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    tiny_en: Any,
    losses: list[list[float]],
    errors: list[int],
    share: float,
    at: int,
) -> None:
    left = heard(monkeypatch, losses, errors)
    before, seen = weights(model), []

    def fit(speech: Any, samples: Any, *given: Any, origin: str) -> None:
        seen.append(len(samples))
        with torch.no_grad():
            for tensor in trained_parameters(speech.network).values():
                tensor.add_(1.0)

    monkeypatch.setattr(module, "fit", fit)
    clip = np.zeros(16000, np.float32)
    samples = [Sample(lambda: clip, 1.0, text) for text in TEXTS]
    speech = bind(model, tiny_en[1])
    found = Guard(speech, samples).check(OPTIONS)
    tokens = found.tokens
    assert tokens == sum(len(speech.token_ids(s.text)[0]) - 2 for s in samples[1::2])
    assert (found.share, found.errors_before) == (share, 8)
    assert found.loss_before == pytest.approx(12 / tokens)
    assert found.loss_after == pytest.approx(sum(losses[at]) / tokens)
    assert found.errors_after == errors[at]
    assert (found.clips, found.words, seen) == (3, 40, [3])
    assert same(weights(model), before)
    assert [next(one, None) for one in left] == [None, None]
    said = Verdict.line(found.to_dict())
    assert {1.0: ": used", 0.5: "used by 50%", 0.0: ": not used"}[share] in said
    assert "\n" not in said and f"{errors[at]} of 40 words" in said


def test_the_loss_and_errors_are_those_of_the_held_back_clips(
    model: Any, tiny_en: Any, utterances: list[Utterance]
) -> None:
    speech = bind(model, tiny_en[1])
    samples = [Sample(u.load, 1.0, u.text) for u in utterances]
    guard = Guard(speech, samples)
    losses, (errors, words) = guard.before
    nats = []
    for sample in samples[1::2]:
        ids, prompt = speech.token_ids(sample.text)
        features, mask = speech.inputs([sample.load()], speech.margin)
        given, kept = torch.tensor([ids[:-1]]), torch.arange(prompt - 1, len(ids) - 1)
        logits = speech.outputs(features, mask, given, kept).logits.detach()
        mean = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prompt:]))
        nats.append(float(mean) * len(kept))
    assert losses == pytest.approx(nats, rel=1e-3)
    assert words == sum(len(s.text.split()) for s in samples[1::2]) and errors > 0
    with pytest.raises(SAMLError, match=f"at least {LEAST}"):
        Guard(speech, samples[: LEAST - 1])


@pytest.mark.parametrize("kind", ["experts", "gates"])
def test_a_profile_that_does_not_help_is_the_unadapted_one(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    tiny_en: Any,
    utterances: list[Utterance],
    kind: str,
    tmp_path: Any,
) -> None:
    before, steps = weights(model), []
    heard(monkeypatch, [WAS, RARER, RARER], [1, 1, 1])
    profile = adapt(
        model, tiny_en[1], utterances, OPTIONS, kind=kind,
        on_step=lambda done, of, loss: steps.append((done, of)),
    )  # fmt: skip
    assert same(weights(model), before)
    assert profile.about["adapted"] is False and profile.about["guard"]["share"] == 0
    assert profile.about["short_windows"] is model.saml.short_windows is False
    assert profile.about["steps"] == 0 and profile.about["loss"] is None
    assert steps == [(1, 6), (2, 6)]  # of those to come, which learn from all, none
    profile.save(tmp_path / "p.safetensors")
    with profile.applied(model):
        offsets = [router.offset for router in model.saml.routers.values()]
        assert all(o is None or not o.any() for o in offsets)
        after = weights(model)
        assert all(torch.allclose(after[n], before[n], atol=0.02) for n in before)


def test_what_is_used_is_learnt_from_all_clips(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    tiny_en: Any,
    utterances: list[Utterance],
    tmp_path: Any,
) -> None:
    alone = adapt(model, tiny_en[1], utterances, OPTIONS, guard=False)
    assert "guard" not in alone.about and "adapted" not in alone.about
    assert "guard" not in adapt(model, tiny_en[1], utterances[: LEAST - 1], OPTIONS).about
    steps: list[tuple[int, int]] = []

    def told(done: int, of: int, loss: float) -> None:
        steps.append((done, of))
        if len(steps) == 4:  # within the training on all clips
            raise KeyboardInterrupt

    file = tmp_path / "checkpoint"
    heard(monkeypatch, [WAS, LIKELIER], [1, 1])
    with pytest.raises(KeyboardInterrupt):
        adapt(model, tiny_en[1], utterances, OPTIONS, checkpoint=file, on_step=told)
    heard(monkeypatch, [WAS, LIKELIER], [1, 1])
    found = adapt(model, tiny_en[1], utterances, OPTIONS, checkpoint=file, on_step=told)
    assert steps[-1] == (6, 6) and found.about["adapted"] is True
    assert all(torch.equal(t, found.tensors[name]) for name, t in alone.tensors.items())
    heard(monkeypatch, [WAS, RARER, LIKELIER], [1, 1, 1])
    half = adapt(model, tiny_en[1], utterances, replace(OPTIONS, checkpoint_every=99))
    start, whole, part = weights(model), alone.experts(model), half.experts(model)
    name = next(n for n in start if n.endswith("lora_b"))
    wanted = (start[name] + whole[name]) / 2
    assert torch.allclose(part[name], wanted, atol=0.05 * float(whole[name].abs().max()))
