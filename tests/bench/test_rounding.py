"""What `python -m bench rounding` measures, and what it does not measure again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.accuracy import rounding
from saml_models.data.corpora import Utterance
from saml_models.evaluation.divergence import Divergence


class Quick(rounding.Bench):
    """Hears and calibrates nothing: notes what it is asked."""

    def __init__(self, keep: Path | None) -> None:
        said = [Utterance("a", "ann", "SOME WORDS", Path("x"))]
        self.name, self.data, self.keep, self.full = "tiny.en", Path(), keep, "full"  # type: ignore[assignment]
        speech: Any = SimpleNamespace(speech=lambda data: said, language="en")
        self.sets, self.asked = {"voices": speech}, list[str]()

    def make(self, variant: str) -> tuple[Any, dict[str, Any]]:
        self.asked.append(f"make {variant}")
        if self.keep and variant != rounding.PLAIN:
            self.kept(variant, self.keep).touch()
        return variant, {}

    def errors(self, speech: Any, key: str, title: str, said: list[Utterance]) -> list[int]:
        self.asked.append(f"hear {speech}")
        return [1]

    def compare(self, models: list[Any], key: str, said: list[Utterance]) -> list[Divergence]:
        self.asked.append(f"compare {models}")
        return [Divergence([0.1], [2], [2]) for _ in models]


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    results: dict[str, Any] = {"speech": {}, "variants": {}}
    variants = [rounding.PLAIN, "calibrated 0"]

    def asked(keep: Path | None, kl_only: bool) -> list[str]:
        bench = Quick(keep)
        rounding.measure(bench, results, lambda: None, variants, 5, kl_only)
        return bench.asked

    made = ["make plain", "make calibrated 0"]
    assert asked(None, True) == ["hear full", *made, f"compare {variants}"]
    assert asked(None, False) == [made[0], "hear plain", made[1], "hear calibrated 0"]
    assert asked(None, False) == []
    # A rounding that is to be kept is made for that.
    assert asked(tmp_path, False) == [made[1]]
    assert (tmp_path / "tiny.en-0.safetensors").exists()
    assert asked(tmp_path, False) == []
