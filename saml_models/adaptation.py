"""Stage 2: one speaker's voice, from the pretrained experts and a few minutes of speech."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saml_kernels.errors import SAMLError
from saml_models.audio import SAMPLE_RATE
from saml_models.conformer import Conformer
from saml_models.corpora import Utterance
from saml_models.decoding import decode_clips
from saml_models.families import family_of
from saml_models.identification import embed
from saml_models.speakers import SpeakerProfile, check_whole, kept_experts
from saml_models.surgery import expert_parameters, routers_of
from saml_models.targets import check_target
from saml_models.training import Sample, TrainingOptions, fit
from saml_models.transcripts import in_model_style, is_bare
from saml_models.window import margin_of

__all__ = ["ADAPTATION", "GATES", "adapt", "model_name", "options_for", "training_samples"]

# What did best on the development speakers; `saml adapt` and `saml evaluate` use it as it is.
ADAPTATION = TrainingOptions(
    learning_rate=2e-4, epochs=8, batch_seconds=30.0, max_batch=4, average=0.3
)

# The same for a small Conformer, which has more to learn than a Whisper and learns it faster.
CONFORMER = replace(ADAPTATION, learning_rate=1e-3, epochs=16)

# A few hundred numbers: they bear large steps, and cannot learn a transcript by heart.
GATES = replace(ADAPTATION, learning_rate=3e-2)

MAX_SECONDS = 30.0  # what Whisper hears at once


def options_for(kind: str, model: Any = None) -> TrainingOptions:
    """The defaults for a kind of profile of a model; None is a Whisper.

    Raises:
        SAMLError: there is no such kind.
    """
    if kind not in ("experts", "gates"):
        raise SAMLError(f"kind {kind!r}: expected experts or gates")
    if kind == "gates":
        return GATES
    return CONFORMER if isinstance(model, Conformer) else ADAPTATION


def model_name(model: Any) -> str:
    """What a model was loaded by; empty where nobody knows."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))


def training_samples(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    keep_audio: bool = True,
    skip_long: bool = False,
) -> list[Sample]:
    """Clips and targets for `fit`; bare transcripts borrow the model's own case and punctuation.

    To a multilingual Whisper they are all in one language, the one it hears in most of a few.

    Args:
        model: hears the clips, to find the style.
        processor: of that model.
        utterances: to train on.
        keep_audio: hold the audio in memory; else it is read again in every epoch.
        skip_long: leave out what is longer than 30 s instead of refusing it.

    Raises:
        SAMLError: an utterance without text, longer than 30 s, whose text is longer than the
            decoder, or whose audio cannot be read.
    """
    family = family_of(model)

    def check(utterance: Utterance, text: str, language: str | None) -> None:
        check_target(model, utterance.id, family.token_ids(processor, text, language)[0])

    for utterance in utterances:  # texts first: they cost no time
        if not utterance.text.strip():
            raise SAMLError(f"{utterance.id}: has no text to learn from; give its transcript")
        # Bare text is learnt in the model's own style, which has few words in capitals.
        check(
            utterance, utterance.text.lower() if is_bare(utterance.text) else utterance.text, None
        )
    samples = []
    kept: list[Utterance] = []
    clips = []
    for utterance in utterances:
        clip = utterance.load()
        seconds = len(clip) / SAMPLE_RATE
        if seconds > MAX_SECONDS and skip_long:
            continue
        if seconds > MAX_SECONDS:
            raise SAMLError(f"{utterance.id}: {seconds:.1f} s long; cut it to 30 s at most")
        kept.append(utterance)
        clips.append(clip)
    if utterances and not kept:
        raise SAMLError(f"{utterances[0].id}: over 30 s long, as all others; cut to 30 s at most")
    language = family.prompt_language(model, processor, clips) if clips else None
    heard = decode_clips(model, processor, clips, language=language)
    for utterance, clip, text in zip(kept, clips, heard, strict=True):
        load = (lambda clip=clip: clip) if keep_audio else utterance.load
        target = in_model_style(utterance.text, text)
        check(utterance, target, language)
        samples.append(Sample(load, len(clip) / SAMPLE_RATE, target, language))
    return samples


def adapt(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    options: TrainingOptions | None = None,
    *,
    speaker: str | None = None,
    kind: str = "experts",
    skip_long: bool = False,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> SpeakerProfile:
    """Learn one speaker from `utterances`; the model itself is left as it was.

    Args:
        model: treated by `apply_saml`, best with pretrained experts.
        processor: of that model.
        utterances: of one speaker, each with text and at most 30 s long.
        options: `options_for(kind, model)` unless given.
        speaker: name for the profile; the utterances' own unless given.
        kind: "experts" learns experts and routers, "gates" an offset to each router's logits.
        skip_long: leave out what is longer than 30 s instead of refusing it.
        checkpoint: as for `training.fit`.
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
    options = options or options_for(kind, model)
    check_whole(model)
    make = SpeakerProfile.of if kind == "experts" else SpeakerProfile.of_gates
    with kept_experts(model):
        samples = training_samples(model, processor, utterances, skip_long=skip_long)
        options = _windows(model, options)
        with nullcontext() if kind == "experts" else _offsets_alone(model):
            report = fit(model, processor, samples, options, checkpoint, on_step)
        profile = make(
            model,
            speaker=speaker or names[0],
            model=model_name(model),
            method="SAML adaptation",
            date=datetime.date.today().isoformat(),
            utterances=len(samples),
            seconds=round(sum(s.seconds for s in samples), 1),
            steps=report.steps,
            loss=round(report.last_loss, 4),
        )
    if not hasattr(model, "get_encoder"):  # ESPnet's: cannot be told apart by voice
        return profile
    return replace(profile, embedding=embed(model, processor, [s.load() for s in samples]))


def _windows(model: Any, options: TrainingOptions) -> TrainingOptions:
    """Options whose clips are heard as they will be, and as the model can learn from few of them.

    Experts that were pretrained on short windows go on with those. The original weights have never
    seen one, which takes more than a few clips to learn: they hear `saml_margin` seconds more.
    """
    margin = margin_of(model)
    if margin is not None and not getattr(model, "saml_short_windows", False):
        return replace(options, margins=(margin,))
    model.saml_short_windows = True
    return options


@contextmanager
def _offsets_alone(model: Any) -> Iterator[None]:
    """Experts and routers are frozen; each router has an offset, from zero, that learns."""
    parameters = expert_parameters(model).values()
    routers = routers_of(model).values()
    if not routers:
        raise SAMLError("gates: the layers have no router of their own; learn experts instead")
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for router in routers:
            count = router.weight.shape[0]
            router.offset = torch.zeros(count, device=router.weight.device, requires_grad=True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
