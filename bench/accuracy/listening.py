"""Several systems hear the same sets of voices; what they got wrong is kept, and not heard again.

Results are {"speech": {set: {"speakers": [...], "words": [...]}}, "systems": {system: {set:
[errors of each utterance]}}}, without what was said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.over_speakers import made_worse, ratio
from bench.accuracy.speech import VOICES
from bench.report.environment import about
from saml_kernels.errors import SAMLError
from saml_kernels.files import write_json
from saml_models.cli.output import progress
from saml_models.data.corpora import Utterance, load_corpus
from saml_models.models.interface import SpeechModel
from saml_models.text.wer import word_errors
from saml_models.transcription.clips import decode_clips

__all__ = ["chosen_sets", "listen", "rows"]

Systems = Mapping[str, Callable[[], SpeechModel]]


def chosen_sets(said: str) -> list[str]:
    """Names of `VOICES` by commas.

    Raises:
        SAMLError: there is no such set.
    """
    chosen = [key.strip() for key in said.split(",")]
    if unknown := [key for key in chosen if key not in VOICES]:
        raise SAMLError(f"--sets {unknown[0]}: expected some of {', '.join(VOICES)}")
    return chosen


def listen(
    systems: Systems, sets: Sequence[str], data: Path, file: Path, model: str
) -> dict[str, Any]:
    """Every utterance of the sets with every system, greedily; the file is written after each set.

    Args:
        systems: by name, how each is made; one is in memory at a time.
        sets: of `VOICES`.
        data: holds them.
        file: results, added to.
        model: what the file says that it is about.

    Returns:
        The results.
    """
    results: dict[str, Any] = {"speech": {}, "systems": {}}
    if file.exists():
        results = json.loads(file.read_text())
    results["about"] = about(torch.device("cpu")) | {"model": model}
    for system, make in systems.items():
        errors = results["systems"].setdefault(system, {})
        missing = [key for key in sets if key not in errors]
        speech = make() if missing else None
        for key in missing:
            assert speech is not None
            said = load_corpus(data / VOICES[key].path, VOICES[key].speakers)
            found = word_errors([u.text for u in said], _heard(speech, said, f"{system}: {key}"))
            errors[key] = [one.errors for one in found]
            own = {"speakers": [u.speaker for u in said], "words": [one.words for one in found]}
            results["speech"].setdefault(key, own)
            write_json(file, results)
    return results


def _heard(speech: SpeechModel, said: list[Utterance], title: str) -> list[str]:
    done = 0
    with progress("decoding") as show:

        def count(more: int) -> None:
            nonlocal done
            done += more
            show(done, len(said), title)

        clips = [u.load() for u in said]
        return decode_clips(speech, clips, language="en", on_done=count)


def rows(
    results: dict[str, Any], compared: Sequence[tuple[str, str]], worse_than: str
) -> list[list[str]]:
    """A row for each set and system.

    Args:
        results: of `listen`.
        compared: columns of ratios with 95 % intervals over speakers: of one system to another,
            where "" is the row's own; cells of what is not there are empty.
        worse_than: the system with which speakers are compared who are made worse; "" for none.

    Returns:
        The set, the system, WER in per cent, the ratios, and for how many speakers there are more
        errors.
    """
    found = []
    for key, speech in results["speech"].items():
        owners = speech["speakers"]
        errors = {name: own[key] for name, own in results["systems"].items() if key in own}
        for system, own in errors.items():
            row = [key, system, f"{100 * sum(own) / sum(speech['words']):.2f}"]
            for one, other in compared:
                above, below = errors.get(one or system), errors.get(other or system)
                same = (one or system) == (other or system)
                row.append("" if same or not above or not below else ratio(owners, above, below))
            if worse_than:
                other_s = errors.get(worse_than) if system != worse_than else None
                row.append(made_worse(owners, own, other_s) if other_s else "")
            found.append(row)
    return found
