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
from saml_models.compress.layers import compression_of
from saml_models.data.corpora import Utterance
from saml_models.models.conformer.model import Conformer
from saml_models.models.interface import SpeechModel
from saml_models.models.registry import bind
from saml_models.speakers.identify import embed
from saml_models.speakers.profile import SpeakerProfile
from saml_models.training.batches import Sample, plan_batches
from saml_models.training.checkpoint import beside
from saml_models.training.choosing import BestEpoch
from saml_models.training.guard import LEAST, Guard, Verdict, between
from saml_models.training.loop import fit
from saml_models.training.objective import trained_parameters
from saml_models.training.options import TrainingOptions, TrainingReport
from saml_models.training.samples import training_samples

__all__ = ["ADAPTATION", "GATE_ADAPTATION", "adapt", "options_for"]

# What did best on the development speakers; `saml adapt` and `saml evaluate` use it as it is.
ADAPTATION = TrainingOptions(
    learning_rate=2e-4, epochs=8, batch_seconds=30.0, max_batch=4, average=0.3
)

# The same for a small Conformer, which has more to learn than a Whisper and learns it faster.
CONFORMER = replace(ADAPTATION, learning_rate=1e-3, epochs=16)

# A few hundred numbers: they bear large steps, and cannot learn a transcript by heart.
GATE_ADAPTATION = replace(ADAPTATION, learning_rate=3e-2)


def options_for(kind: str, model: Any = None) -> TrainingOptions:
    """The defaults for a kind of profile of a model; None is a Whisper.

    Raises:
        SAMLError: there is no such kind.
    """
    if kind not in ("experts", "gates"):
        raise SAMLError(f"kind {kind!r}: expected experts or gates")
    if kind == "gates":
        return GATE_ADAPTATION
    return CONFORMER if isinstance(model, Conformer) else ADAPTATION


def adapt(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    options: TrainingOptions | None = None,
    *,
    speaker: str | None = None,
    kind: str = "experts",
    skip_long: bool = False,
    unsure: Sequence[Utterance] = (),
    choose: Sequence[Utterance] = (),
    language: str | None = None,
    guard: bool = True,
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
        unsure: others of the speaker, whose texts may be wrong: learnt from too, but the guard
            holds none of them back.
        choose: others of the speaker, not learnt from: of the weights after each epoch those are
            taken, in place of the last ones' average, that find most of their tokens likeliest. So
            do SAML's authors. Not with a checkpoint.
        language: code of what is spoken; None is what a multilingual model hears in most of a few.
        guard: from five of `utterances` on, and without `choose`: learn from half of them first,
            and use what all teach as far as that made the other half likelier; see `guard`.
        checkpoint: as for `training.fit`; the guard adds its name to the file's.
        on_step: called with (steps done, steps in all, loss).

    Returns:
        The profile: `.save(path)`, `.apply(model)`, `with profile.applied(model): ...`. Where the
        guard was asked, `about["adapted"]` says whether anything that was learnt is used, and
        `about["guard"]` holds the numbers: see `guard.Verdict`.

    Raises:
        SAMLError: nothing to learn from, utterances of several speakers, or bad audio.

    Example:
        >>> model, processor = load_adaptable("tiny.en")
        >>> clips = utterances_of([(np.zeros(16000, np.float32), "Yes.")])
        >>> adapt(model, processor, clips, TrainingOptions(epochs=1)).about["utterances"]
        1
    """
    if not utterances:
        raise SAMLError("adapt: no utterances; give at least one clip with its text")
    names = sorted({u.speaker for u in utterances})
    if len(names) > 1 and speaker is None:
        raise SAMLError(
            f"adapt: utterances of {len(names)} speakers ({names[0]}, {names[1]}, ...); choose one"
        )
    if choose and checkpoint is not None:
        raise SAMLError("adapt: a run that chooses among its epochs cannot be resumed")
    options = options or options_for(kind, model)
    speech, saml = bind(model, processor), compression_of(model)
    saml.check_whole()
    make = SpeakerProfile.of if kind == "experts" else SpeakerProfile.of_gates
    with saml.snapshot():
        samples = training_samples(speech, utterances, skip_long=skip_long, language=language)
        language = samples[0].language
        guarded = guard and not choose and len(samples) >= LEAST
        more = training_samples(speech, unsure, skip_long=skip_long, language=language)
        watching = Guard(speech, samples, more) if guarded else None
        samples += more
        unadapted = saml.short_windows
        options = _windows(speech, options)
        notes: dict[str, Any] = {}
        with nullcontext() if kind == "experts" else _offsets_alone(model):
            if watching is not None:
                report, verdict = _guarded(watching, samples, options, checkpoint, on_step)
                notes = {"adapted": verdict.share > 0, "guard": verdict.to_dict()}
                saml.short_windows = saml.short_windows if verdict.share else unadapted
            elif choose:
                options = replace(options, average=0.0)
                held = training_samples(speech, choose, skip_long=skip_long, language=language)
                best = BestEpoch(speech, held, options)
                report = fit(speech, samples, options, None, on_step, best.look)
                best.take()
            else:
                origin = saml.experts_hash()
                report = fit(speech, samples, options, checkpoint, on_step, origin=origin)
        profile = make(
            model,
            speaker=speaker or names[0],
            model=speech.name,
            method="SAML adaptation",
            date=datetime.date.today().isoformat(),
            utterances=len(samples),
            seconds=round(sum(s.seconds for s in samples), 1),
            steps=report.steps,
            loss=round(report.last_loss, 4) if report.steps else None,
            **notes,
        )
    if not hasattr(model, "get_encoder"):  # ESPnet's: cannot be told apart by voice
        return profile
    return replace(profile, embedding=embed(speech, [s.load() for s in samples]))


def _guarded(
    watching: Guard,
    samples: Sequence[Sample],
    options: TrainingOptions,
    checkpoint: Path | None,
    on_step: Callable[[int, int, float], None] | None,
) -> tuple[TrainingReport, Verdict]:
    """What is learnt from all clips, as far as the guard lets it be used."""
    ahead, last = (
        len(plan_batches([s.seconds for s in part], options)) for part in (watching.learnt, samples)
    )

    def at(before: int) -> Callable[[int, int, float], None]:
        def told(done: int, _: int, loss: float) -> None:
            if on_step:
                on_step(before + done, ahead + last, loss)

        return told

    verdict = watching.check(options, beside(checkpoint, "guard"), at(0))
    if not verdict.share:
        return TrainingReport(), verdict
    own = trained_parameters(watching.speech.network)
    start = {name: tensor.detach().clone() for name, tensor in own.items()}
    origin = compression_of(watching.speech.network).experts_hash()
    report = fit(watching.speech, samples, options, checkpoint, at(ahead), origin=origin)
    if verdict.share < 1:
        end = {name: tensor.detach().clone() for name, tensor in own.items()}
        between(watching.speech, own, start, end, verdict.share)
    return report, verdict


def _windows(speech: SpeechModel, options: TrainingOptions) -> TrainingOptions:
    """Options whose clips are heard as they will be, and as the model can learn from few of them.

    Experts that were pretrained on short windows go on with those. The original weights have never
    seen one, which takes more than a few clips to learn: they get `Compression.margin` seconds.
    """
    saml, margin = compression_of(speech.network), speech.margin
    if margin is not None and not saml.short_windows:
        return replace(options, margins=(margin,))
    saml.short_windows = True
    return options


@contextmanager
def _offsets_alone(model: Any) -> Iterator[None]:
    """Experts and routers are frozen; each router has an offset, from zero, that learns."""
    saml = compression_of(model)
    parameters, routers = saml.experts().values(), saml.routers.values()
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
