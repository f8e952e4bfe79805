"""What a grown Conformer owes to its branches: the systems, their errors and the ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from synthetic import small_conformer_whisper, small_whisper

from bench.accuracy import conformer
from saml_kernels import SAMLError
from saml_models.models.whisper.conformer import new_branches

SAID = "the quick brown fox"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two speakers; a network with new branches hears all words, others lose one or two."""
    models = {"grown": small_conformer_whisper(), "tiny.en": small_whisper()}
    models["control"] = small_whisper(seed=1)
    monkeypatch.setattr(conformer, "load_model", lambda name: (models[name], None))
    monkeypatch.setattr(conformer, "bind", lambda network, processor: network)

    def heard(network: Any, clips: Any, on_done: Any) -> list[str]:
        on_done(len(clips))
        speaks = any(value.any() for n, value in new_branches(network).items() if ".fc2." in n)
        missing = 0 if speaks else 1 if network is models["control"] else 2
        return [" ".join(SAID.split()[missing:]) for _ in clips]

    monkeypatch.setattr(conformer, "decode_clips", heard)
    rows = []
    for i, speaker in enumerate(("ann", "ann", "bob")):
        file = tmp_path / f"{i}.wav"
        soundfile.write(file, np.zeros(1600), 16000)
        rows.append({"audio": str(file), "text": SAID, "speaker": speaker})
    path = tmp_path / "voices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_systems_and_ratios(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpus.with_name("out.json")
    conformer.main("grown", [corpus], control="control", json=out)
    rows = {row["system"]: row for row in json.loads(out.read_text())["conformer"]}
    assert {name: row["wer"] for name, row in rows.items()} == {
        **{"grown": 0.0, "grown, new branches zero": 50.0, "Whisper": 50.0},
        "Whisper, encoder trained as long": 25.0,
    }
    assert rows["Whisper"]["grown_to_it"] == [0.0, 0.0, 0.0]
    assert "new branches zero" in capsys.readouterr().out


def test_a_whisper_is_no_grown_one(corpus: Path) -> None:
    with pytest.raises(SAMLError, match="expected a Conformer"):
        conformer.main("tiny.en", [corpus])
