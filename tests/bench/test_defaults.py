"""`python -m bench defaults`: figures by plain arithmetic; what was heard is not heard again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.accuracy import defaults
from bench.accuracy.defaults_rows import counted, rows
from saml_kernels import SAMLConfig, SAMLError
from saml_models.data.corpora import Utterance
from saml_models.evaluation.protocol import Fold
from saml_models.training.adapt import ADAPTATION, GATE_ADAPTATION

SAID = "here they all went"


def results() -> dict[str, Any]:
    def heard(*counts: int) -> list[dict[str, Any]]:
        return [{"errors": [n], "loops": n // 4} for n in counts]

    return {
        "speech": {"choosing": {"speakers": ["a", "a", "b", "b"], "words": [4] * 4}},
        "variants": {
            "default": {
                "heard": {
                    "choosing": {
                        "experts": heard(2, 2, 2, 2),
                        "adapted 0": heard(1, 1, 2, 2),
                        "other 0": heard(2, 2, 2, 2),
                        "adapted 1": heard(1, 1, 4, 4),
                        "other 1": heard(2, 2, 2, 2),
                        "adapted 2": heard(1, 1),  # not to the end yet
                    }
                }
            },
            "hot": {"heard": {"choosing": {"adapted 0": heard(2, 2, 4, 4)}}},
        },
    }


def test_rows_pool_seeds_and_compare_the_same_utterances() -> None:
    default, hot = rows(results())
    assert default[:4] == ["default", "choosing", "50.00", "50.00"]
    # Mean errors of the seeds: 1, 1, 3, 3 of the experts' 2 each.
    assert default[4].startswith("1.000 (0.0") and default[5].startswith("1.000")
    assert default[6] == "" and default[7:] == ["1 of 2", "2"]
    assert hot[2:6] == ["", "75.00", "", ""] and hot[7:] == ["", "2"]
    assert hot[6].startswith("1.500 (0.1")
    assert len(counted(results(), "default", "choosing", "adapted")) == 2


def test_voices_with_sixty_utterances_together() -> None:
    """Where all of them were heard: 6 of 9 errors are left of 4 voices' 16 words."""
    found: dict[str, Any] = {"speech": {}, "variants": {"default": {"heard": {}}}}
    for key, speakers, before, after in (
        ("readers", ["a", "b"], [2, 1], [1, 1]),
        ("england", ["a"], [4], [3]),
        ("noisy", ["c"], [2], [1]),
    ):
        assert [row[1] for row in rows(found)] == list(found["speech"])
        found["speech"][key] = {"speakers": speakers, "words": [4] * len(speakers)}
        found["variants"]["default"]["heard"][key] = {
            "experts": [{"errors": before, "loops": 0}],
            "adapted 0": [{"errors": after, "loops": 1}],
        }
    *_, last = rows(found)
    assert last[1:4] == ["readers, england, noisy", "56.25", "37.50"]
    assert last[4].startswith("0.667 (0.4") and "clips" not in last[4]
    assert last[5:] == ["", "", "0 of 4", "3"]


class Quick(defaults.Variant):
    """Adapts and hears nothing: counts what it is asked."""

    asked: list[Any]

    def adaptable(self, show: Console) -> tuple[Any, Any]:
        class Saml:
            class saml:
                @staticmethod
                def experts_hash() -> str:
                    return "h"

        self.asked.append("load")
        return Saml, None

    def adapted(self, loaded: Any, folds: Any, number: int, place: Path, seed: int) -> Any:
        self.asked.append((number, seed))
        return f"profile {number}"


def test_what_was_heard_is_not_heard_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoken(Utterance):
        def load(self) -> Any:
            return self.id

    def fold(speaker: str) -> Fold:
        return Fold(speaker, [], [Spoken(speaker, speaker, SAID, tmp_path)])

    class Voices:
        @staticmethod
        def folds(data: Path) -> list[Fold]:
            return [fold("a"), fold("b"), fold("b")]

    heard: list[Any] = []

    def decode(speech: Any, clips: Any, speakers: Any) -> list[str]:
        heard.append((clips[0], speakers[0]))
        if len(heard) == stop:
            raise KeyboardInterrupt
        return ["here they walked"] * len(clips)

    monkeypatch.setattr(defaults, "VOICES", {"choosing": Voices})
    monkeypatch.setattr(defaults, "decode_clips", decode)
    monkeypatch.setattr(defaults, "bind", lambda *loaded: loaded)
    monkeypatch.setattr(defaults, "in_loop", lambda speech, text: False)
    variant = Quick("some name", {}, "tiny.en", tmp_path, tmp_path)
    variant.asked = []
    found: dict[str, Any] = {"speech": {}, "variants": {}}
    saved: list[int] = []

    def measure() -> None:
        defaults.measure(
            variant, ["choosing"], [7], found, lambda: saved.append(1), Console(quiet=True)
        )

    stop = 5
    with pytest.raises(KeyboardInterrupt):
        measure()
    assert len(saved) == 4 and len(found["variants"]["some name"]["heard"]["choosing"]) == 2
    measure()
    own = found["variants"]["some name"]["heard"]["choosing"]
    assert {system: len(folds) for system, folds in own.items()} == {
        "experts": 3, "adapted 7": 3, "other 7": 3,
    }  # fmt: skip
    assert own["adapted 7"][0] == {"errors": [2], "loops": 0}
    assert found["speech"]["choosing"] == {"speakers": ["a", "b", "b"], "words": [4, 4, 4]}
    # Another's adaptation is that of the next fold of another speaker.
    assert heard[-3:] == [("a", "profile 1"), ("b", "profile 0"), ("b", "profile 0")]
    variant.asked.clear()
    measure()
    assert variant.asked == []
    variant.changes = {"guard": True}
    with pytest.raises(SAMLError, match=r"some name: in the results it is .*; give this one"):
        measure()
    variant.changes = {}
    # Of one speaker there is no other one's adaptation.
    monkeypatch.setattr(Voices, "folds", staticmethod(lambda data: [fold("a"), fold("a")]))
    stop, found["speech"], found["variants"] = 0, {}, {}
    measure()
    assert set(found["variants"]["some name"]["heard"]["choosing"]) == {"experts", "adapted 7"}


class Made:
    """A profile that says who made it."""

    def __init__(self, way: str, *given: Any, **options: Any) -> None:
        self.said = [way, len(given[2]), *(f"{k}={v}" for k, v in options.items() if k == "kind")]
        self.said.append(given[3].learning_rate if len(given) > 3 else None)
        self.said.append(len(options.get("known", ())))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.said))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["adapt", 4, "kind=experts", ADAPTATION.learning_rate, 0]),
        ({"kind": "gates"}, ["adapt", 4, "kind=gates", GATE_ADAPTATION.learning_rate, 0]),
        ({"known": 0}, ["unsupervised", 4, "kind=experts", ADAPTATION.learning_rate, 0]),
        (
            {"known": 3, "adaptation": {"learning_rate": 0.5}},
            ["unsupervised", 1, "kind=experts", 0.5, 3],
        ),
    ],
)
def test_how_a_variant_adapts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    expected: list[Any],
) -> None:
    monkeypatch.setattr(defaults, "adapt", lambda *a, **o: Made("adapt", *a, **o))
    monkeypatch.setattr(
        defaults, "adapt_unsupervised", lambda *a, **o: Made("unsupervised", *a, **o)
    )
    monkeypatch.setattr(defaults.SpeakerProfile, "load", lambda path: json.loads(path.read_text()))
    variant = defaults.Variant("some name", changes, "tiny.en", tmp_path, tmp_path)
    clips = [Utterance(f"a-{i}", "a", SAID, tmp_path) for i in range(4)]
    folds = [Fold("a", clips, [])]
    for _ in range(2):  # made once, then read
        assert variant.adapted((object(), None), folds, 0, tmp_path, 0) == expected
        monkeypatch.setattr(defaults, "adapt", None)
        monkeypatch.setattr(defaults, "adapt_unsupervised", None)


def test_bad_variants_are_named(tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(SAMLError, match=match):
            defaults.main(tmp_path, tmp_path / "a.json", tmp_path / "work", **options)

    refused("--only fast: expected some of default, one LoRA", only="default,fast")
    refused(r"--variant hot: expected NAME", variant=["hot"])
    refused(r"--variant hot:3: expected NAME", variant=["hot:3"])
    assert not (tmp_path / "a.json").exists()
    variant = defaults.Variant("hot", {"experts": "none"}, "tiny.en", tmp_path, tmp_path)
    with pytest.raises(SAMLError, match="hot: none: no such file"):
        variant.adaptable(Console(quiet=True))


def test_experts_that_ship_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(defaults, "load_adaptable", lambda *given: asked.append(given) or (0, 0))
    for changes in ({"experts": True}, {"experts": False, "config": {"num_experts": 1}}):
        defaults.Variant("v", changes, "tiny.en", tmp_path, tmp_path).adaptable(Console(quiet=True))
    assert asked == [("tiny.en",), ("tiny.en", SAMLConfig(num_experts=1))]


def test_options_from_json() -> None:
    found = defaults.options(ADAPTATION, {"speeds": [0.9, 1.1], "epochs": 2})
    assert found.speeds == (0.9, 1.1) and found.epochs == 2
