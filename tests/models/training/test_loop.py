"""`fit` and `adapt`: the loss falls, a killed run resumes to the same weights, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from synthetic import small_whisper

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.data.corpora import Utterance, load_corpus
from saml_models.models.registry import bind
from saml_models.training import batches
from saml_models.training import loop as training
from saml_models.training.adapt import adapt
from saml_models.training.checkpoint import Checkpoint, forget
from saml_models.training.choosing import BestEpoch
from saml_models.training.loop import Sample, fit
from saml_models.training.options import TrainingOptions

OPTIONS = TrainingOptions(
    learning_rate=3e-3,
    epochs=3,
    max_batch=1,
    average=0.5,
    weight_decay=0.01,
    checkpoint_every=1,
)
CONFIG = SAMLConfig(num_experts=2, rank=2, dropout=0.1, balance=0.01)


class Killed(Exception):
    """What a test's `on_step` raises."""


@pytest.fixture(scope="module")
def utterances(speech_root: Path) -> list[Utterance]:
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])
    return sorted(found, key=lambda u: len(u.load()))[:2]


@pytest.fixture(scope="module")
def samples(utterances: list[Utterance]) -> list[Sample]:
    clips = [u.load()[:32000] for u in utterances]  # two seconds, so that the suite stays quick
    return [
        Sample(lambda clip=clip: clip, len(clip) / 16000, u.text.capitalize())
        for clip, u in zip(clips, utterances, strict=True)
    ]


def make(config: SAMLConfig = CONFIG) -> Any:
    model = small_whisper(vocabulary=51864)
    torch.manual_seed(1)
    apply_saml(model, config)
    return model


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.saml.experts().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def uninterrupted(tiny_en: Any, samples: list[Sample]) -> dict[str, torch.Tensor]:
    model = make()
    report = fit(bind(model, tiny_en[1]), samples, OPTIONS)
    assert report.steps == 6
    return weights(model)


def test_the_loss_falls_and_only_experts_change(tiny_en: Any, samples: list[Sample]) -> None:
    model = make()
    frozen = {n: t.clone() for n, t in model.state_dict().items() if n not in weights(model)}
    before, seen = weights(model), []
    report = fit(
        bind(model, tiny_en[1]), samples,
        replace(OPTIONS, epochs=12, average=0.0, learning_rate=1e-2),
        on_step=lambda done, steps, loss: seen.append((done, steps, loss)),
    )  # fmt: skip
    assert [s[:2] for s in seen] == [(i, 24) for i in range(1, 25)]
    assert report.last_loss < 0.8 * report.first_loss
    assert report.first_loss == pytest.approx(np.mean([s[2] for s in seen[:2]]))
    after = weights(model)
    assert all(not torch.equal(after[n], before[n]) for n in before)
    for name, value in frozen.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not model.training
    assert model.saml.context.mask is None
    assert model.config.max_source_positions == 1500
    rounded = weights(model)
    model.saml.round_experts()
    assert equal(weights(model), rounded)


@pytest.mark.parametrize("killed_after", [1, 4, 6])
def test_a_killed_run_resumes_to_the_same_weights(
    killed_after: int, uninterrupted: Any, tiny_en: Any, samples: list[Sample], tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"

    def kill(done: int, steps: int, loss: float) -> None:
        if done == killed_after:
            raise Killed

    model = make()
    with pytest.raises(Killed):
        fit(bind(model, tiny_en[1]), samples, OPTIONS, path, kill)
    assert path.exists()
    assert not model.training
    assert model.saml.context.mask is None
    seen = []
    again = make()
    fit(bind(again, tiny_en[1]), samples, OPTIONS, path, lambda done, *_: seen.append(done))
    assert seen == list(range(killed_after + 1, 7))
    assert equal(weights(again), uninterrupted)
    assert path.exists()  # until the result is saved
    losses = fit(bind(model, tiny_en[1]), samples, OPTIONS, path, lambda *_: 1 / 0)
    assert losses.last_loss > 0 and equal(weights(model), uninterrupted)
    forget(path)
    assert not path.exists()


def test_the_same_model_may_resume_too(
    uninterrupted: Any, tiny_en: Any, samples: list[Sample], tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"

    def kill(done: int, steps: int, loss: float) -> None:
        if done == 5:
            raise Killed

    model = make()
    every_second = replace(OPTIONS, checkpoint_every=2)  # step 5 is lost and done again
    with pytest.raises(Killed):
        fit(bind(model, tiny_en[1]), samples, every_second, path, kill)
    fit(bind(model, tiny_en[1]), samples, OPTIONS, path)
    assert equal(weights(model), uninterrupted)


@pytest.fixture
def checkpoint(tiny_en: Any, samples: list[Sample], tmp_path: Path) -> Path:
    path = tmp_path / "run.safetensors"

    def kill(done: int, steps: int, loss: float) -> None:
        raise Killed

    with pytest.raises(Killed):
        fit(bind(make(), tiny_en[1]), samples, OPTIONS, path, kill)
    return path


def test_a_checkpoint_of_another_run_is_refused(
    checkpoint: Path, tiny_en: Any, samples: list[Sample]
) -> None:
    before = checkpoint.read_bytes()
    other_text = [replace(samples[0], text="Something else."), samples[1]]
    for data, options, model in [
        (other_text, OPTIONS, make()),
        (samples[:1], OPTIONS, make()),
        (samples, replace(OPTIONS, learning_rate=1e-3), make()),
        (samples, OPTIONS, make(replace(CONFIG, top_k=1))),
    ]:
        with pytest.raises(SAMLError, match="other data, options or experts"):
            fit(bind(model, tiny_en[1]), data, options, checkpoint)
    assert checkpoint.read_bytes() == before


def test_a_damaged_checkpoint_is_refused(
    checkpoint: Path, tiny_en: Any, samples: list[Sample]
) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(SAMLError, match="not a whole safetensors file"):
        fit(bind(make(), tiny_en[1]), samples, OPTIONS, checkpoint)


def test_what_has_had_no_gradient_yet_is_resumed_too(tmp_path: Path) -> None:
    """A CTC head, where its loss is left out: it has no moments to keep."""

    def begun() -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer, Checkpoint]:
        own = {name: torch.nn.Parameter(torch.ones(2)) for name in ("heard", "unheard")}
        optimiser = torch.optim.AdamW(own.values())
        return own, optimiser, Checkpoint(tmp_path / "c", own, list(own), optimiser, {}, "run")

    own, optimiser, checkpoint = begun()
    own["heard"].grad = torch.ones(2)
    optimiser.step()
    checkpoint.save(1, 0.5)
    again, resumed, checkpoint = begun()
    assert checkpoint.resume() == 1
    assert all(torch.equal(again[name], value) for name, value in own.items())
    assert again["heard"] in resumed.state and again["unheard"] not in resumed.state


def test_nothing_to_learn_from(tiny_en: Any) -> None:
    with pytest.raises(SAMLError, match="no clips"):
        fit(bind(make(), tiny_en[1]), [], OPTIONS)
    with pytest.raises(SAMLError, match="no utterances"):
        adapt(make(), tiny_en[1], [])


def test_a_loss_that_is_not_finite_is_an_error(tiny_en: Any, samples: list[Sample]) -> None:
    broken = Sample(lambda: np.full(32000, np.nan, np.float32), 2.0, "Hello.")
    model = make()
    with pytest.raises(SAMLError, match="loss is nan"):
        fit(bind(model, tiny_en[1]), [broken], OPTIONS)
    assert not model.training


def test_batches_hold_every_clip_once_an_epoch() -> None:
    seconds = [float(s) for s in np.random.default_rng(0).uniform(1, 20, 40)]
    options = TrainingOptions(epochs=2, batch_seconds=60.0, max_batch=5)
    planned = batches.plan_batches(seconds, options)
    assert sorted(i for b in planned for i in b) == sorted([*range(40)] * 2)
    for batch in planned:
        assert len(batch) <= 5
        assert (max(seconds[i] for i in batch) + 1.0) * len(batch) <= 60.0
    assert batches.plan_batches(seconds, options) == planned
    assert batches.plan_batches(seconds, replace(options, seed=1)) != planned


def test_each_epoch_is_told_when_it_ends(tiny_en: Any, samples: list[Sample]) -> None:
    model, seen = make(), list[Any]()
    options = replace(OPTIONS, average=0.0)
    fit(bind(model, tiny_en[1]), samples, options, on_epoch=lambda: seen.append(weights(model)))
    assert len(seen) == options.epochs
    assert not equal(seen[0], seen[1])
    planned = [[0, 1], [2], [1], [0, 2]]
    assert training._epoch_ends(planned, 3, 1) == {2, 4}
    assert training._epoch_ends(planned, 3, 2) == {1, 2}


def test_the_epoch_that_others_like_best_is_taken(
    tiny_en: Any, utterances: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = make(), list[Any]()
    right = iter((3, 5, 5))

    class Told(BestEpoch):
        def look(self) -> None:
            count = next(right)
            tokens, prompt = self.speech.token_ids(self.samples[0].text)
            logits = torch.zeros(len(tokens) - prompt, 51864)
            logits[torch.arange(count), torch.tensor(tokens[prompt : prompt + count])] = 1
            monkeypatch.setattr(self.speech, "text_logits", lambda *given: logits)
            kept.append(weights(model))
            super().look()

    monkeypatch.setattr("saml_models.training.adapt.BestEpoch", Told)
    short = replace(utterances[0], samples=utterances[0].load()[:16000])
    other = replace(utterances[1], text="One two three four five six.")
    options = replace(OPTIONS, speeds=(1.0,))
    profile = adapt(model, tiny_en[1], [short], options, choose=[other])
    found = profile.experts(model)
    name = next(iter(found))
    # The second: better than the first, and the third is no better. As stored, so nearly.
    assert (found[name] - kept[1][name]).abs().max() < 0.02 * kept[1][name].abs().max()
    assert not torch.allclose(kept[1][name], kept[2][name], rtol=0.02)
    with pytest.raises(SAMLError, match="cannot be resumed"):
        adapt(model, tiny_en[1], [short], options, choose=[other], checkpoint=Path("x"))


def test_schedule_warms_up_and_falls() -> None:
    options = TrainingOptions(warmup=0.1)
    rates = [training._learning_rate(i, 100, options, 1.0) for i in range(100)]
    assert rates[0] < 0.11
    assert max(rates) == max(rates[8:12])
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
    assert all(math.isfinite(r) and r > 0 for r in rates)


def test_targets_leave_out_the_prompt_and_the_padding(tiny_en: Any, samples: list[Sample]) -> None:
    tokenizer = tiny_en[1].tokenizer
    make_batch = batches.BatchMaker(bind(*tiny_en), samples, OPTIONS)
    batch = make_batch(0, [0, 1])
    inputs, targets = batch.inputs, batch.targets
    for row, sample in enumerate(samples):
        kept = targets[row] != batches.IGNORED
        text = tokenizer.decode(targets[row][kept])
        assert text == " " + sample.text + tokenizer.eos_token
        start = tokenizer.decode(inputs[row, : len(tokenizer.prefix_tokens)])
        assert start == "<|startoftranscript|><|notimestamps|>"
    assert torch.equal(batch.kept, (targets.flatten() != batches.IGNORED).nonzero().flatten())
    for row, (begin, end) in zip(targets, batch.words, strict=True):
        assert row[end] == tokenizer.eos_token_id
        assert torch.equal(row[begin:end], row[row != batches.IGNORED][:-1])
    again = make_batch(0, [0, 1])
    assert all(map(torch.equal, batch.tensors(), again.tensors()))
    assert not torch.equal(make_batch(1, [0]).features, make_batch(2, [0]).features)


def test_experts_that_know_no_short_windows_learn_in_the_models_own(
    monkeypatch: pytest.MonkeyPatch, tiny_en: Any, utterances: list[Utterance]
) -> None:
    model, seen = make(), []
    model.saml.margin = 10.0
    monkeypatch.setattr(
        "saml_models.training.adapt.fit",
        lambda *args, **how: seen.append(args[2].margins) or fit(*args, **how),
    )
    profile = adapt(model, tiny_en[1], utterances, replace(OPTIONS, epochs=1))
    assert profile.about["short_windows"] is False
    assert seen == [(10.0,)]


def test_adapt_returns_a_profile_and_leaves_the_model_alone(
    tiny_en: Any, utterances: list[Utterance]
) -> None:
    model = make()
    before = weights(model)
    options = replace(OPTIONS, epochs=1)
    profile = adapt(model, tiny_en[1], utterances, options)
    assert equal(weights(model), before)
    assert not model.saml.short_windows
    assert profile.about["speaker"] == utterances[0].speaker
    assert profile.about["utterances"] == 2
    assert profile.about["short_windows"] is True
    with profile.applied(model):
        assert not equal(weights(model), before)
    with pytest.raises(SAMLError, match="2 speakers"):
        adapt(model, tiny_en[1], [utterances[0], replace(utterances[1], speaker="b")], options)
    with pytest.raises(SAMLError, match="no text"):
        adapt(model, tiny_en[1], [replace(utterances[0], text=" ")], options)


@pytest.fixture
def left_behind() -> Iterator[None]:
    """A Trainer's state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_beside_what_a_trainer_left_in_the_process(
    device: str, left_behind: None, tiny_en: Any, samples: list[Sample]
) -> None:
    """accelerate's state is one for the process: another precision or device in it is no fault."""
    PartialState().device = torch.device(device)
    report = fit(bind(make(), tiny_en[1]), samples, replace(OPTIONS, epochs=1))
    assert math.isfinite(report.last_loss)
