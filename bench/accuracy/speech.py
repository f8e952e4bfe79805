"""The development speech that experiments are judged on."""

from __future__ import annotations

from pathlib import Path

from saml_models.data.corpora import Utterance, load_corpus

__all__ = ["READERS", "development_speech"]

READERS = ("163", "332", "1867", "3526", "7859", "8629")  # of train-clean-5; never trained on


def development_speech(data: Path) -> dict[str, list[Utterance]]:
    """Utterances by set: six readers of train-clean-5, test-other, speechocean762's test part.

    `data` holds `LibriSpeech/` and `speechocean762/`.
    """
    return {
        "train-clean-5": load_corpus(data / "LibriSpeech" / "train-clean-5", list(READERS)),
        "test-other": load_corpus(data / "LibriSpeech" / "test-other"),
        "speechocean762": load_corpus(data / "speechocean762" / "test.jsonl"),
    }
