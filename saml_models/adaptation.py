"""Stage 2: one speaker's voice, from the pretrained experts and a few minutes of speech."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saml_kernels.errors import SAMLError
from saml_models.audio import SAMPLE_RATE
from saml_models.corpora import Utterance
from saml_models.decoding import decode_clips
from saml_models.speakers import SpeakerProfile, kept_experts
from saml_models.training import Sample, TrainingOptions, fit
from saml_models.transcripts import in_model_style

__all__ = ["ADAPTATION", "adapt", "training_samples"]

# What did best on the development speakers; `saml adapt` and `saml evaluate` use it as it is.
ADAPTATION = TrainingOptions(
    learning_rate=5e-4, epochs=8, batch_seconds=30.0, max_batch=4, average=0.3
)

MAX_SECONDS = 30.0  # what Whisper hears at once


def training_samples(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    keep_audio: bool = True,
    skip_long: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> list[Sample]:
    """Clips and targets for `fit`; bare transcripts borrow the model's own case and punctuation.

    Args:
        model: hears the clips, to find the style.
        processor: of that model.
        utterances: to train on.
        keep_audio: hold the audio in memory; else it is read again in every epoch.
        skip_long: leave out what is longer than 30 s instead of refusing it.
        on_done: called with a number of clips as they are heard.

    Raises:
        SAMLError: an utterance without text, longer than 30 s, or whose audio cannot be read.
    """
    samples = []
    kept: list[Utterance] = []
    clips = []
    for utterance in utterances:
        if not utterance.text.strip():
            raise SAMLError(f"{utterance.id}: has no text to learn from; give its transcript")
        clip = utterance.load()
        seconds = len(clip) / SAMPLE_RATE
        if seconds > MAX_SECONDS and skip_long:
            continue
        if seconds > MAX_SECONDS:
            raise SAMLError(f"{utterance.id}: {seconds:.1f} s long; cut it to 30 s at most")
        kept.append(utterance)
        clips.append(clip)
    heard = decode_clips(model, processor, clips, on_done=on_done)
    for utterance, clip, text in zip(kept, clips, heard, strict=True):
        load = (lambda clip=clip: clip) if keep_audio else utterance.load
        target = in_model_style(utterance.text, text)
        samples.append(Sample(load, len(clip) / SAMPLE_RATE, target))
    return samples


def adapt(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    options: TrainingOptions | None = None,
    *,
    speaker: str | None = None,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> SpeakerProfile:
    """Learn one speaker from `utterances`; the model itself is left as it was.

    Args:
        model: treated by `apply_saml`, best with pretrained experts.
        processor: of that model.
        utterances: of one speaker, each with text and at most 30 s long.
        options: `ADAPTATION` unless given.
        speaker: name for the profile; the utterances' own unless given.
        checkpoint: a file to resume from if the run is killed.
        on_step: called with (steps done, steps in all, loss).

    Returns:
        The profile: `.save(path)`, `.apply(model)`, `with profile.applied(model): ...`.

    Raises:
        SAMLError: nothing to learn from, utterances of several speakers, or bad audio.
    """
    if not utterances:
        raise SAMLError("adapt: no utterances; give at least one clip with its text")
    names = sorted({u.speaker for u in utterances})
    if len(names) > 1 and speaker is None:
        raise SAMLError(
            f"adapt: utterances of {len(names)} speakers ({names[0]}, {names[1]}, ...); choose one"
        )
    options = options or ADAPTATION
    with kept_experts(model):
        samples = training_samples(model, processor, utterances)
        # The original weights have never seen a short window; the experts learn it as they train.
        model.saml_short_windows = True  # type: ignore[assignment]
        report = fit(model, processor, samples, options, checkpoint, on_step)
        return SpeakerProfile.of(
            model,
            speaker=speaker or names[0],
            model=str(getattr(model.config, "_name_or_path", "")),
            method="SAML adaptation",
            date=datetime.date.today().isoformat(),
            utterances=len(samples),
            seconds=round(sum(s.seconds for s in samples), 1),
            steps=report.steps,
            loss=round(report.last_loss, 4),
        )
