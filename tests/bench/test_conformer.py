"""What a grown Conformer owes to its branches: the systems, their errors and the ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import small_conformer_whisper, small_whisper

from bench.accuracy import conformer, listening
from saml_kernels import SAMLError
from saml_models.data.corpora import Utterance
from saml_models.models.whisper.conformer import new_branches

SAID = "the quick brown fox"


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two speakers; a network with new branches hears all words, others lose one or two."""
    models = {"grown": small_conformer_whisper(), "tiny.en": small_whisper()}
    models["control"] = small_whisper(seed=1)
    clip = np.zeros(1600, np.float32)
    said = [Utterance(s, s, SAID, Path(f"{s}.wav"), samples=clip) for s in ("ann", "bob")]
    monkeypatch.setattr(listening, "load_corpus", lambda path, speakers: said)
    monkeypatch.setattr(conformer, "load_model", lambda name: (models[name], None))
    monkeypatch.setattr(conformer, "bind", lambda network, processor: network)

    def decode(network: Any, clips: Any, language: str, on_done: Any) -> list[str]:
        on_done(len(clips))
        speaks = any(value.any() for n, value in new_branches(network).items() if ".fc2." in n)
        missing = 0 if speaks else 1 if network is models["control"] else 2
        return [" ".join(SAID.split()[missing:]) for _ in clips]

    monkeypatch.setattr(listening, "decode_clips", decode)


@pytest.mark.usefixtures("heard")
def test_systems_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    conformer.main("grown", tmp_path, out, control="control", sets="noisy")
    rows = {row[1]: row for row in conformer.rows(json.loads(out.read_text()))}
    assert {name: row[2] for name, row in rows.items()} == {
        conformer.GROWN: "0.00",
        conformer.BARE: "50.00",
        conformer.WHISPER: "50.00",
        conformer.CONTROL: "25.00",
    }
    assert rows[conformer.GROWN][3] == ""
    assert rows[conformer.WHISPER][3].startswith("0.000 (0.000 to 0.")
    assert "new branches zero" in capsys.readouterr().out
    assert "quick" not in out.read_text()  # counts, not what people said


@pytest.mark.usefixtures("heard")
def test_a_whisper_is_no_grown_one(tmp_path: Path) -> None:
    with pytest.raises(SAMLError, match="expected a Conformer"):
        conformer.main("tiny.en", tmp_path, tmp_path / "out.json", sets="noisy")
