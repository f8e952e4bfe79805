"""`python -m bench experts`: figures by plain arithmetic; what was heard is not heard again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.accuracy import experts, listening
from saml_kernels import SAMLError
from saml_models.data.corpora import Utterance

SAID = "here they all went"
MISSING = {experts.FULL: 1, experts.QUANTISED: 2, experts.SHIPPED: 1, "mine": 3}  # words of four


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Which systems were asked; ann's shipped experts lose three words more than bob's."""
    asked: list[Any] = []
    clip = np.zeros(1600, np.float32)
    said = [Utterance(s, s, SAID, Path(f"{s}.wav"), samples=clip) for s in ("ann", "bob")]
    monkeypatch.setattr(listening, "load_corpus", lambda path, speakers: said)
    monkeypatch.setattr(
        experts, "systems", lambda model, files: {name: lambda name=name: name for name in MISSING}
    )

    def decode(system: str, clips: list[Any], language: str, on_done: Any) -> list[str]:
        asked.append(system)
        on_done(len(clips))
        lost = [MISSING[system], MISSING[system]]
        if system == experts.SHIPPED:
            lost[0] += 3
        return [" ".join(SAID.split()[n:]) for n in lost]

    monkeypatch.setattr(listening, "decode_clips", decode)
    return asked


def test_systems_beside_those_without_experts(heard: list[Any], tmp_path: Path) -> None:
    mine, out = tmp_path / "mine.safetensors", tmp_path / "out.json"
    mine.touch()
    experts.main(tmp_path, out, experts=[f"mine={mine}"], sets="choosing,noisy")
    experts.main(tmp_path, out, experts=[f"mine={mine}"], sets="choosing,noisy")
    assert heard == [system for system in MISSING for _ in range(2)]
    full, quantised, shipped, own = experts.rows(json.loads(out.read_text()))[:4]
    assert full == ["choosing", "full precision", "25.00", "", "", "", ""]
    assert quantised[2] == "50.00" and quantised[3].startswith("2.000 (2.000 to 2.000")
    assert shipped[2] == "62.50" and shipped[4].startswith("1.250 (0.0") and shipped[6] == "1 of 2"
    assert own[2:4] == ["75.00", "3.000 (3.000 to 3.000)"] and own[6] == "2 of 2"
    assert own[5].startswith("1.200 (0.") and not shipped[5]


def test_some_systems_alone(heard: list[Any], tmp_path: Path) -> None:
    experts.main(tmp_path, tmp_path / "out.json", sets="noisy", only=f"{experts.SHIPPED}, mine")
    assert heard == [experts.SHIPPED, "mine"]
    assert list(json.loads((tmp_path / "out.json").read_text())["systems"]) == heard
    # What is heard later stands where it belongs: the others are compared with it.
    experts.main(tmp_path, tmp_path / "out.json", sets="noisy", only=experts.FULL)
    experts.main(tmp_path, tmp_path / "out.json", sets="noisy", only="mine")
    assert heard == [experts.SHIPPED, "mine", experts.FULL]
    full, shipped, own = experts.rows(json.loads((tmp_path / "out.json").read_text()))
    assert full[1] == experts.FULL and shipped[3].startswith("2.500 (") and own[3][:7] == "3.000 ("
    with pytest.raises(SAMLError, match=r"--only other: expected some of .*mine"):
        experts.main(tmp_path, tmp_path / "out.json", sets="noisy", only="mine,other")


def test_other_systems_after_those_of_an_earlier_call(
    heard: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    experts.main(tmp_path, out, sets="noisy", only="mine")
    again = {name: lambda: "mine" for name in ("mine, again", "again, too")}
    monkeypatch.setattr(experts, "systems", lambda model, files: again)
    experts.main(tmp_path, out, sets="noisy", only="again, too, mine, again")
    assert list(json.loads(out.read_text())["systems"]) == ["mine", "mine, again", "again, too"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(SAMLError, match=r"--sets birds: expected some of choosing"):
        experts.main(tmp_path, tmp_path / "out.json", sets="birds")
    with pytest.raises(SAMLError, match=r"--experts mine=none: expected NAME=FILE"):
        experts.main(tmp_path, tmp_path / "out.json", experts=["mine=none"])
