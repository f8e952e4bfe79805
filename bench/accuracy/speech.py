"""The speech that experiments are judged on, and what stage 1 may learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saml_kernels.errors import SAMLError
from saml_models.data.corpora import Utterance, by_speaker, load_corpus
from saml_models.evaluation.protocol import Fold, make_folds

__all__ = ["READERS", "VOICES", "check_sets", "development_speech", "training_speech"]

READERS = ("163", "332", "1867", "3526", "7859", "8629")  # of train-clean-5; never trained on


@dataclass(frozen=True)
class Voices:
    """People to adapt to.

    Attributes:
        path: below the data.
        speakers: some of them; None: all.
        first: utterances to adapt on, the others to test on; None: two-fold.
    """

    path: str
    speakers: Sequence[str] | None = None
    first: int | None = None

    def folds(self, data: Path) -> list[Fold]:
        """By the protocol, in file order."""
        found = load_corpus(data / self.path, self.speakers)
        return make_folds(by_speaker(found), self.first, 2)


# Defaults are chosen on the first. The others are reported; some choices were made on them too.
VOICES = {
    "choosing": Voices("speechocean762-more/choosing.jsonl"),
    "learners": Voices("speechocean762/test.jsonl"),
    "train-clean-5": Voices("LibriSpeech/train-clean-5", READERS, 20),
    "test-other": Voices("LibriSpeech/test-other"),
    "readers": Voices("librispeech-readers/dev.jsonl", None, 60),
    "england": Voices("vctk/dev.jsonl", None, 60),
    "noisy": Voices("voicebank-noisy/dev.jsonl", None, 60),
}


def check_sets(names: Sequence[str]) -> None:
    """Refuse names that `VOICES` has not.

    Raises:
        SAMLError: there is no such set.
    """
    if unknown := [name for name in names if name not in VOICES]:
        raise SAMLError(f"--sets {unknown[0]}: expected some of {', '.join(VOICES)}")


TRAINING = (
    "librispeech-first-utterances",
    "librispeech-dev-clean-mp3",
    "speechocean762",
    "speechocean762-more",
    "kathleen",
    "ljspeech",
)


def training_speech(data: Path) -> list[Utterance]:
    """What stage 1 and calibration may hear: nobody of `VOICES`.

    The sets hold other people of other names, but for some of LibriSpeech. A name that is also one
    in another corpus is left out too.
    """
    names = ("speechocean762/test", "librispeech-readers/dev", "vctk/dev", "voicebank-noisy/dev")
    measured = {u.speaker for name in names for u in load_corpus(data / f"{name}.jsonl")}
    found = load_corpus(data / "LibriSpeech" / "train-clean-5")
    for part in TRAINING:
        found += load_corpus(data / part / "train.jsonl")
    return [u for u in found if u.speaker not in {*READERS, *measured}]


def development_speech(data: Path) -> dict[str, list[Utterance]]:
    """Utterances by set: six readers of train-clean-5, test-other, speechocean762's test part.

    `data` holds `LibriSpeech/` and `speechocean762/`.
    """
    return {
        "train-clean-5": load_corpus(data / "LibriSpeech" / "train-clean-5", list(READERS)),
        "test-other": load_corpus(data / "LibriSpeech" / "test-other"),
        "speechocean762": load_corpus(data / "speechocean762" / "test.jsonl"),
    }
