"""Speaker-adaptive training: each voice's own gates, which are forgotten in the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import small_whisper

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.models.registry import bind
from saml_models.training.batches import BatchMaker, Sample
from saml_models.training.loop import _groups, fit
from saml_models.training.objective import Objective
from saml_models.training.options import TrainingOptions
from saml_models.training.speaker_offsets import speaker_offsets

OPTIONS = TrainingOptions(
    learning_rate=1e-3, epochs=2, max_batch=2, speaker_rate=1e-2, anonymous=0.5, margins=(1.0,),
    checkpoint_every=1,
)  # fmt: skip


def samples(count: int = 4) -> list[Sample]:
    rng = np.random.default_rng(0)
    clips = [rng.standard_normal(16000).astype(np.float32) * 0.1 for _ in range(count)]
    return [
        Sample(lambda clip=clip: clip, 1.0, "Yes, no.", speaker="ab"[i % 2])
        for i, clip in enumerate(clips)
    ]


def made(**config: Any) -> Any:
    model = small_whisper(vocabulary=51864)
    torch.manual_seed(1)
    apply_saml(model, SAMLConfig(num_experts=2, rank=2, **config))
    for tensor in model.saml.experts().values():
        torch.nn.init.normal_(tensor, std=0.1)
    return model


def test_each_clip_is_told_whose_it_is_and_some_are_nobodys(tiny_en: Any) -> None:
    clips = samples(40)
    speech = bind(made(), tiny_en[1])

    def speakers(anonymous: float) -> list[int]:
        maker = BatchMaker(speech, clips, replace(OPTIONS, anonymous=anonymous))
        return maker(3, list(range(40))).speakers.tolist()

    assert speakers(0.0) == [1, 2] * 20
    assert speakers(1.0) == [0] * 40
    drawn = speakers(0.5)
    assert 8 < drawn.count(0) < 32
    assert all(n in (0, i % 2 + 1) for i, n in enumerate(drawn))


@pytest.mark.parametrize("router", ["token", "utterance"])
def test_a_speakers_offset_acts_on_the_speakers_clips_alone(tiny_en: Any, router: str) -> None:
    """As the same offset does in a profile of gates; nobody's row is the model without one."""
    model, clips = made(router=router), samples()
    speech = bind(model, tiny_en[1])
    objective = Objective(speech, OPTIONS)
    make = BatchMaker(speech, clips, replace(OPTIONS, freq_masks=0, time_masks=0, speeds=(1.0,)))

    def loss(anonymous: float, index: list[int]) -> float:
        make.options = replace(make.options, anonymous=anonymous)
        with torch.no_grad():
            return float(objective(make(0, index)))

    model.eval()
    alone = loss(0.0, [0]), loss(0.0, [1])
    with speaker_offsets(model, clips):
        for router_ in model.saml.routers.values():
            router_.offset.data[1] = torch.tensor([2.0, -2.0])
        assert loss(0.0, [1]) == pytest.approx(alone[1], abs=1e-6)
        assert loss(1.0, [0]) == pytest.approx(alone[0], abs=1e-6)
        own = loss(0.0, [0])
        together = loss(0.0, [0, 1])
    assert abs(own - alone[0]) > 1e-5
    assert together == pytest.approx((own + alone[1]) / 2, abs=1e-5)  # texts are as long
    for router_ in model.saml.routers.values():
        assert router_.offset is None
        router_.offset = torch.tensor([2.0, -2.0])
    assert loss(0.0, [0]) == pytest.approx(own, abs=1e-5)


def test_offsets_learn_at_their_own_rate_and_nobodys_stays_zero(tiny_en: Any) -> None:
    model, clips = made(), samples()
    speech = bind(model, tiny_en[1])
    frozen = {n: t.detach().clone() for n, t in model.saml.experts().items()}
    with speaker_offsets(model, clips):
        fit(speech, clips, replace(OPTIONS, learning_rate=0.0))
        tables = [router.offset.detach() for router in model.saml.routers.values()]
    assert all(table[0].abs().max() == 0 for table in tables)
    assert max(float(table[1:].abs().max()) for table in tables) > 1e-3
    kept = model.saml.experts()
    # Rounded to how they are stored, and else as they were.
    assert all(torch.allclose(kept[n], t, atol=5e-3) for n, t in frozen.items())


def test_only_who_learns_is_asked_whose_a_clip_is(tiny_en: Any, tmp_path: Path) -> None:
    """Within the training the model hears nobody's clips as ever; resumed it knows its voices."""
    model, clips = made(), samples()
    speech = bind(model, tiny_en[1])
    heard = []

    def listen() -> None:
        tokens, prompt = speech.token_ids("Yes, no.", None)
        with speech.evaluating(), torch.no_grad():
            heard.append(speech.text_logits(clips[0].load(), tokens, prompt, 1.0))
        if len(heard) == 1:
            raise KeyboardInterrupt

    file, still = tmp_path / "checkpoint", replace(OPTIONS, learning_rate=0.0, max_batch=1)
    with speaker_offsets(model, clips), pytest.raises(KeyboardInterrupt):
        fit(speech, clips, still, file, on_epoch=listen)
    named = [replace(clip, speaker="ba"[i % 2]) for i, clip in enumerate(clips)]
    with speaker_offsets(model, named), pytest.raises(SAMLError, match="other data"):
        fit(speech, named, still, file)
    with speaker_offsets(model, clips):
        fit(speech, clips, still, file, on_epoch=listen)
    assert torch.allclose(heard[0], heard[1], atol=1e-4)


def test_a_parameter_that_is_called_offset_is_one_like_others() -> None:
    groups = _groups({"deform.offset": torch.zeros(2, 3)}, (), OPTIONS)
    assert [group["peak"] for group in groups] == [OPTIONS.learning_rate]


def test_a_router_that_looks_at_nothing_is_refused(tiny_en: Any) -> None:
    with (
        pytest.raises(SAMLError, match=r"speaker_rate.*token"),
        speaker_offsets(made(router="speaker"), samples()),
    ):
        pass
