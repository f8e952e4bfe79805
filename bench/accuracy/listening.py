"""Several systems hear the same sets of voices; what they got wrong is kept, and not heard again.

Results are {"speech": {set: {"speakers": [...], "words": [...]}}, "systems": {system: {set:
[errors of each utterance]}}}, without what was said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.kept import check_speech, resumed, speech_of
from bench.accuracy.over_speakers import made_worse, ratio
from bench.accuracy.speech import VOICES, check_sets
from bench.report.environment import about
from saml_kernels.files import write_json
from saml_models.cli.output import progress
from saml_models.data.corpora import Utterance, load_corpus
from saml_models.models.interface import SpeechModel
from saml_models.text.wer import word_errors
from saml_models.transcription.clips import decode_clips

__all__ = ["listen", "rows"]

Systems = Mapping[str, Callable[[], SpeechModel]]


def listen(
    systems: Systems, sets: str, data: Path, file: Path, model: str, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Every utterance of the sets with every system, greedily; the file is written after each set.

    Args:
        systems: by name, how each is made; one is in memory at a time.
        sets: of `VOICES`, by commas.
        data: holds them.
        file: results, added to.
        model: what the file says that it is about.
        only: some of the systems; none given is all of them.

    Returns:
        The results.

    Raises:
        SAMLError: there is no such set, or the file is of another model or other speech.
    """
    chosen = [key.strip() for key in sets.split(",")]
    check_sets(chosen)
    results = resumed(file, model, ("speech", "systems"))
    results["about"] = about(torch.device("cpu")) | {"model": model}
    # Rows are compared with those above them: whatever is heard first, the order is the systems',
    # after those of earlier calls.
    before = results["systems"]
    earlier = {name: errors for name, errors in before.items() if name not in systems}
    results["systems"] = heard = earlier | {name: before.get(name, {}) for name in systems}
    for system in only or systems:
        errors = heard[system]
        missing = [key for key in chosen if key not in errors]
        speech = systems[system]() if missing else None
        for key in missing:
            assert speech is not None
            said = load_corpus(data / VOICES[key].path, VOICES[key].speakers)
            check_speech(results, key, speech_of(said))
            found = word_errors([u.text for u in said], _heard(speech, said, f"{system}: {key}"))
            errors[key] = [one.errors for one in found]
            write_json(file, results | {"systems": {n: e for n, e in heard.items() if e}})
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
    results: dict[str, Any],
    *,
    of: Sequence[str] = (),
    to: Sequence[str] = (),
    worse_than: str = "",
) -> list[list[str]]:
    """A row for each set and system, which is compared with those above it.

    Args:
        results: of `listen`.
        of: systems whose errors are divided by the row's own.
        to: systems by whose errors the row's own are divided.
        worse_than: a system; for how many speakers the row's own makes more errors.

    Returns:
        The set, the system, WER in per cent, ratios with 95 % intervals over speakers, those of
        `of` first, and how many speakers are made worse; what is not above a row has empty cells.
    """
    found = []
    for key, speech in results["speech"].items():
        owners, above = speech["speakers"], dict[str, list[int]]()
        for system, errors in results["systems"].items():
            if key not in errors:
                continue
            own = errors[key]
            row = [key, system, f"{100 * sum(own) / sum(speech['words']):.2f}"]
            row += [ratio(owners, above[name], own) if name in above else "" for name in of]
            row += [ratio(owners, own, above[name]) if name in above else "" for name in to]
            if worse_than:
                known = worse_than in above
                row.append(made_worse(owners, own, above[worse_than]) if known else "")
            found.append(row)
            above[system] = own
    return found
