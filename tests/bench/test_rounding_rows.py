"""Figures of `python -m bench rounding` by plain arithmetic; what is measured is not again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.accuracy import rounding
from bench.accuracy.rounding_rows import FULL, mean_kl, pooled_ratio, rows, wer
from saml_kernels import SAMLError
from saml_models.compress.calibrate import Recipe
from saml_models.evaluation.divergence import Divergence


def results() -> dict[str, Any]:
    speech = {
        "vctk": {"speakers": ["a", "a", "b"], "words": [10, 10, 20]},
        "noisy": {"speakers": ["a"], "words": [10]},
    }
    full = {"vctk": {"errors": [1, 1, 2]}, "noisy": {"errors": [4]}}
    plain = {
        "vctk": {"errors": [2, 2, 4], "kl": [1.0, 0.0, 2.0], "tokens": [5, 5, 10]},
        "noisy": {"errors": [8], "kl": [3.0], "tokens": [6]},
    }
    return {"speech": speech, "variants": {FULL: {"sets": full}, "plain": {"sets": plain}}}


def test_rates_divergences_and_ratios() -> None:
    found = results()
    assert wer(found, "plain", "vctk") == 20 and mean_kl(found, "plain", "vctk") == 0.15
    # Everybody makes twice the errors, whoever is drawn; "a" of two sets is two people.
    assert pooled_ratio(found, "plain", FULL) == pytest.approx((2.0, 2.0, 2.0))
    assert rows(found) == [
        [FULL, "10.00", "40.00", ""],
        ["plain", "20.00, 0.1500", "80.00, 0.5000", "2.000 (2.000 to 2.000)"],
    ]
    found["variants"]["plain"]["sets"]["vctk"]["errors"] = [2, 2, 2]
    ratio, low, high = pooled_ratio(found, "plain", FULL)
    assert ratio == 14 / 8 and 0.5 < low < ratio < high < 4
    del found["variants"]["plain"]["sets"]["noisy"]
    assert rows(found)[1] == ["plain", "15.00, 0.1500", "", ""]


def test_what_is_in_the_file_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoken:
        speaker, text = "a", "some words"

    class Counting(rounding.Bench):
        def __init__(self) -> None:
            self.calls: list[Any] = []
            self.name, self.data, self.full = "tiny.en", Path("data"), "full"  # type: ignore[assignment]
            self.sets, self.keep = rounding.SETS, None

        def make(self, variant: str) -> Any:
            self.calls.append(("make", variant))
            if self.keep and variant != rounding.PLAIN:
                self.kept(variant, self.keep).touch()
            return variant, {}

        def errors(self, speech: Any, key: str, title: str, said: Any) -> Any:
            self.calls.append(("errors", title, key))
            return [0]

        def compare(self, models: Any, key: str, said: Any) -> Any:
            self.calls.append(("compare", tuple(models), key))
            return [Divergence([0.1], [2], [2]) for _ in models]

    monkeypatch.setattr(rounding.Set, "speech", lambda own, data: [Spoken()])
    found: dict[str, Any] = {"speech": {}, "variants": {}}
    saved: list[int] = []
    bench = Counting()

    def run(variants: list[str], kl_only: bool) -> list[Any]:
        bench.calls.clear()
        rounding.measure(bench, found, lambda: saved.append(1), variants, 5, kl_only)
        return list(bench.calls)

    first = run(["plain"], True)
    assert first.count(("make", "plain")) == 1 and len(saved) > len(rounding.SETS)
    assert {call[0] for call in first} == {"make", "errors", "compare"}
    assert run(["plain"], True) == []
    more = run(["plain", "calibrated 0"], True)
    assert [c for c in more if c[0] != "compare"] == [("make", "calibrated 0")]
    assert all(call[1] == ("calibrated 0",) for call in more if call[0] == "compare")
    words = run(["plain"], False)
    assert [c for c in words if c[0] == "errors"] == [
        ("errors", "plain", key) for key in rounding.ENGLISH
    ]
    assert len(rows(found)) == 3
    # What is to be kept is made for that, once.
    bench.keep = tmp_path
    assert run(["plain", "calibrated 0"], True) == [("make", "calibrated 0")]
    assert (tmp_path / "tiny.en-0.safetensors").exists()
    assert run(["plain", "calibrated 0"], True) == []


def test_a_recipe_is_its_name_and_its_fields() -> None:
    assert rounding._recipe('all rows alike:{"finer_rows": 0}') == (
        "all rows alike",
        Recipe(finer_rows=0),
    )
    for wrong in ("mine", "mine:{", 'mine:{"rows": 0}', "mine:3"):
        with pytest.raises(SAMLError, match=r"--recipe mine.*: expected NAME:\{JSON\}"):
            rounding._recipe(wrong)
