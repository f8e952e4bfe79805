"""`python -m saml_models.server.learner FOLDER NAME ...`: one voice learnt, in its own process.

The server starts it, reads how far it is from the voice's `status.json`, and starts it again where
it was killed: it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from saml_kernels.errors import SAMLError
from saml_models.data.corpora import Utterance
from saml_models.evaluation.protocol import heard_before_and_after, with_word_errors
from saml_models.runtime.quiet import quiet_libraries
from saml_models.server.voices import HELD_BACK, Voice
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.store import ProfileStore
from saml_models.training.adapt import adapt, options_for
from saml_models.training.checkpoint import forget

__all__ = ["divided", "learn"]

OFTEN = 5  # steps from one checkpoint to the next
SELDOM = 0.3  # seconds between two notes of how far it is
NICENESS = 10
_PR_SET_PDEATHSIG = 1  # prctl(2)


def divided(ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Clips to learn from, and every fifth, which is held back to tell before from after."""
    ordered = sorted(ids)
    held = ordered[HELD_BACK - 1 :: HELD_BACK]
    return [id for id in ordered if id not in held], held


def learn(
    voice: Voice, model: str, experts: str | None, device: str, epochs: int | None = None
) -> None:
    """Adapt to a voice's clips, note what was heard before and after, and save the profile.

    Raises:
        SAMLError: there are no clips, or they cannot be learnt from.
    """
    clips = voice.notes["clips"]
    if not clips:
        raise SAMLError(f"{voice.name}: there are no clips; record some first")
    kept, held = divided(list(clips))

    def utterances(ids: Sequence[str]) -> list[Utterance]:
        return [
            Utterance(id=id, audio=voice.clip(id), text=clips[id]["text"], speaker=voice.name)
            for id in ids
        ]

    network, processor = load_adaptable(model, experts=experts, device=device)
    options = replace(options_for("experts", network), checkpoint_every=OFTEN)
    if epochs is not None:
        options = replace(options, epochs=epochs)
    checkpoint = voice.folder / "checkpoint"
    noted = 0.0

    def on_step(done: int, steps: int, loss: float) -> None:
        nonlocal noted
        if time.monotonic() - noted > SELDOM:
            noted = time.monotonic()
            voice.status = {
                "state": "learning", "step": done, "steps": steps, "loss": round(loss, 4),
            }  # fmt: skip

    profile = adapt(
        network, processor, utterances(kept), options, speaker=voice.name, checkpoint=checkpoint,
        on_step=on_step,
    )  # fmt: skip
    heard: list[dict[str, str]] = []
    if held:
        samples = utterances(held)
        profile = with_word_errors(profile, network, processor, samples)
        before, after = heard_before_and_after(profile, network, processor, samples)
        heard = [
            {"id": u.id, "text": u.text, "before": was, "after": now}
            for u, was, now in zip(samples, before, after, strict=True)
        ]
    profile.save(voice.path)
    told = ("wer_before", "wer_after", "adapted")
    rates = {key: rate for key, rate in profile.about.items() if key in told}
    voice.status = {"state": "learnt", "held": heard, **rates}
    forget(checkpoint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Learn one voice; 0 also where it failed for a reason that trying again does not mend."""
    parser = argparse.ArgumentParser(prog="saml_models.server.learner")
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--model", required=True)
    parser.add_argument("--experts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int)
    given = parser.parse_args(arguments)
    _end_with_the_server()
    os.nice(NICENESS)
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))  # the others transcribe
    quiet_libraries()
    voice = Voice(ProfileStore(given.folder), given.name)
    with open(voice.folder / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever was before is still ending
        try:
            learn(voice, given.model, given.experts, given.device, given.epochs)
        except SAMLError as error:
            voice.status = {"state": "failed", "error": str(error)}
            forget(voice.folder / "checkpoint")
    return 0


def _end_with_the_server() -> None:
    """Be killed when the process that started this one is; Linux alone knows how."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
