"""Results that are added to: another model's, or those of other speech, are not mixed in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.accuracy.kept import check_speech, resumed, speech_of
from saml_kernels import SAMLError
from saml_models.data.corpora import Utterance


def test_results_of_one_model(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert resumed(file, "tiny.en", ("speech", "systems")) == {"speech": {}, "systems": {}}
    file.write_text(json.dumps({"about": {"model": "tiny.en"}, "speech": {"noisy": {}}}))
    assert resumed(file, "tiny.en", ("speech",))["speech"] == {"noisy": {}}
    with pytest.raises(SAMLError, match=r"holds results of tiny\.en, not of base"):
        resumed(file, "base", ("speech",))


def test_results_of_the_same_utterances(tmp_path: Path) -> None:
    said = [Utterance(str(n), "ann", "I'm there " * n, tmp_path) for n in (1, 2)]
    own = speech_of(said)
    assert own == {"speakers": ["ann", "ann"], "words": [3, 6]}
    results = {"speech": {}}
    check_speech(results, "noisy", own)
    check_speech(results, "noisy", speech_of(said))
    with pytest.raises(SAMLError, match="noisy: the results are of other utterances"):
        check_speech(results, "noisy", speech_of(said[:1]))
