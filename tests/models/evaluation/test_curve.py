"""WER against utterances learnt from: who takes part where, figures by plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from saml_kernels import SAMLError
from saml_models.data.corpora import Utterance
from saml_models.evaluation import curve as module
from saml_models.evaluation.curve import Curve, curve_folds, learning_curve
from saml_models.evaluation.figures import plot_curve
from saml_models.text.wer import WordErrors


def people(**counts: int) -> dict[str, list[Utterance]]:
    return {
        name: [Utterance(f"{name}{i}", name, "here they went", Path(name)) for i in range(count)]
        for name, count in counts.items()
    }


def test_everybody_goes_as_far_as_a_quarter_is_left() -> None:
    folds = curve_folds(people(a=20, b=111), (40, 5, 10, 80, 20))
    assert {k: [fold.speaker for fold in own] for k, own in folds.items()} == {
        5: ["a", "b"], 10: ["a", "b"], 20: ["b"], 40: ["b"], 80: ["b"],
    }  # fmt: skip
    # Tested on the same utterances at every count, learnt from the first.
    assert [[u.id for u in folds[k][0].test] for k in (5, 10)] == [
        [f"a{i}" for i in range(10, 20)]
    ] * 2
    assert [u.id for u in folds[5][1].train] == [f"b{i}" for i in range(5)]
    assert {len(fold.test) for own in folds.values() for fold in own if fold.speaker == "b"} == {31}


@pytest.mark.parametrize(
    ("counts", "message"), [((0, 5), "at least 1"), ((), "at least 1"), ((9,), "a: 10 utterances")]
)
def test_counts_that_cannot_be(counts: Any, message: str) -> None:
    with pytest.raises(SAMLError, match=message):
        curve_folds(people(a=10), counts)


def wrong(count: int) -> list[WordErrors]:
    return [WordErrors(substitutions=count, hits=10 - count)]


def test_rates_and_what_they_are_compared_with(tmp_path: Path) -> None:
    found = Curve(
        {0: {"a": wrong(4), "b": wrong(8)}, 5: {"a": wrong(2), "b": wrong(4)}, 20: {"b": wrong(1)}}
    ).to_dict()
    none, five, twenty = found["curve"]
    assert (none["wer"], none["unadapted"], none["speakers"]) == (60.0, 60.0, 2)
    assert (five["wer"], five["unadapted"]) == (30.0, 60.0)
    assert five["ratio_interval_95"] == [0.5, 0.5]
    assert five["interval_95"] is None  # of two speakers
    # The one speaker who got so far, beside that speaker's own rate before.
    assert (twenty["wer"], twenty["unadapted"], twenty["interval_95"]) == (10.0, 80.0, None)
    assert found["speakers"] == {
        "a": {"0": 40.0, "5": 20.0}, "b": {"0": 80.0, "5": 40.0, "20": 10.0},
    }  # fmt: skip
    plot_curve(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_each_count_adapts_anew_and_is_heard_with_its_profile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    current: list[int] = [0]

    class Profile:
        def __init__(self, count: int) -> None:
            self.count, self.about = count, {"adapted": count > 5}

        def applied(self, model: Any) -> Any:
            from contextlib import contextmanager

            @contextmanager
            def block() -> Any:
                current.append(self.count)
                yield
                current.pop()

            return block()

    monkeypatch.setattr(module, "bind", lambda *saml: saml)
    monkeypatch.setattr(Utterance, "load", lambda own: own.id)
    monkeypatch.setattr(
        module,
        "adapt",
        lambda model, processor, train, options, skip_long, guard: Profile(len(train)),
    )
    monkeypatch.setattr(
        module,
        "decode_clips",
        lambda speech, clips, beam_size, language: (
            ["here they went" if current[-1] > 5 else "here"] * len(clips)
        ),
    )
    done: list[int] = []
    plan = curve_folds(people(a=20), (5, 10))
    found = learning_curve((None, None), plan, on_done=done.append).to_dict()
    assert [(p["utterances"], p["wer"]) for p in found["curve"]] == [
        (0, 66.667), (5, 66.667), (10, 0.0),
    ]  # fmt: skip
    assert [p["unused"] for p in found["curve"]] == [0, 1, 0]
    assert done == [1, 1]

    kept, learnt = tmp_path / "curve.json.checkpoint", list[int]()

    def twice(model: Any, processor: Any, train: Any, options: Any, **more: Any) -> Profile:
        if len(learnt) == 1:
            learnt.append(0)
            raise KeyboardInterrupt
        learnt.append(len(train))
        return Profile(len(train))

    monkeypatch.setattr(module, "adapt", twice)
    monkeypatch.setattr(module, "run_of", lambda models, folds, options, **settings: "this run")
    with pytest.raises(KeyboardInterrupt):
        learning_curve((None, None), plan, checkpoint=kept)
    assert learning_curve((None, None), plan, checkpoint=kept).to_dict() == found
    assert learnt == [5, 0, 10]
    kept.write_text('{"run": "this run", "parts": 5}')
    with pytest.raises(SAMLError, match="damaged checkpoint; remove it"):
        learning_curve((None, None), plan, checkpoint=kept)
