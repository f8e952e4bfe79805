"""Stage 1: experts and routers learn from many speakers, the base stays frozen."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.layers.linear import SAMLLinear
from saml_models.compress.layers import compression_of, model_hash
from saml_models.data.corpora import Utterance, by_speaker
from saml_models.models.interface import QUANTISED_MARGIN, SpeechModel
from saml_models.models.registry import bind
from saml_models.speakers.profile import SpeakerProfile
from saml_models.training.batches import Sample
from saml_models.training.calibration import input_moments, start_experts, starts_from_error
from saml_models.training.checkpoint import beside
from saml_models.training.loop import fit
from saml_models.training.options import TrainingOptions, TrainingReport
from saml_models.training.samples import PER_SPEAKER, balanced, training_samples
from saml_models.training.speaker_offsets import check_routers, speaker_offsets
from saml_models.training.teacher import taught

__all__ = ["PRETRAINING", "pretrain"]

# What made the experts that ship for tiny.en: docs, "Pretrained experts".
PRETRAINING = TrainingOptions(learning_rate=5e-4, epochs=2, noise=0.5, teacher=0.5)

# All of it made voices unlike those of the training speech worse: docs, "Without adaptation".
ENCODER_SHARE = 0.5


def pretrain(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    options: TrainingOptions | None = None,
    *,
    per_speaker: int = PER_SPEAKER,
    encoder_share: float | None = None,
    runs: int = 1,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_heard: Callable[[int, int], None] | None = None,
    on_taught: Callable[[int, int], None] | None = None,
    original: Any | None = None,
) -> SpeakerProfile:
    """Train the experts of `model` in place on utterances of many speakers.

    Beside calibrated weights they start as a LoRA does, drawn by the options' seed. Beside plainly
    rounded ones, unless `SAMLConfig.expert_init` asks for that too, they start where, on some of
    this speech, they undo most of what rounding did to the layers' outputs.

    Args:
        model: treated by `apply_saml`.
        processor: of that model.
        utterances: each with text; what is longer than 30 s is left out.
        options: `PRETRAINING` unless given, without its teacher where there is no `original`.
        per_speaker: utterances of one speaker at most, drawn by the options' seed.
        encoder_share: of what the encoder's experts learn, that is kept (weights between those of
            the start and those learnt, arXiv 2109.01903), where they start as a LoRA does; None is
            `ENCODER_SHARE` there and all elsewhere.
        runs: from one start, each with a seed of its own, the options' and those after it; what is
            kept is the mean of what they learn (model soups, arXiv 2203.05482).
        checkpoint: a file to resume from if the run is killed; each run adds its number to it.
        on_step: called with (steps done, steps in all, loss).
        on_heard: called before that with (clips whose style was found, clips in all).
        on_taught: called then with (clips that the teacher heard, clips in all).
        original: the same model at full precision, for the start and as the teacher; None starts
            from the experts that `model` has, without one.

    Returns:
        The experts as a profile, to start adaptations from.

    Raises:
        SAMLError: nothing to learn from, bad audio, a teacher wanted and not given, a share that
            is none, or of experts that have learnt before, or no runs.
    """
    if not utterances:
        raise SAMLError("pretrain: no utterances; give speech of many speakers with its text")
    if runs < 1:
        raise SAMLError(f"pretrain: {runs} runs; give at least one")
    encoder_share = _share(model, encoder_share)
    if options is not None and options.speaker_rate:
        check_routers(model)
    speech, saml = bind(model, processor), compression_of(model)
    # The style of what is heard is borrowed: in windows that fresh experts can hear something in.
    saml.margin = QUANTISED_MARGIN
    options = options or (PRETRAINING if original else replace(PRETRAINING, teacher=0.0))
    if options.teacher and original is None:
        raise SAMLError("pretrain: a teacher is asked for; give original, the full-precision model")

    samples = training_samples(
        speech,
        balanced(utterances, per_speaker, options.seed),
        keep_audio=False,
        skip_long=True,
        heard=beside(checkpoint, "heard.json"),
        on_done=on_heard,
    )
    teacher = None if original is None else bind(original, processor)
    if teacher is not None and options.teacher:
        kept = beside(checkpoint, "teacher.safetensors")
        samples = taught(teacher, samples, options.teacher, kept, on_taught)
    saml.short_windows = True
    _start(model, teacher, samples, options)
    origin = "" if teacher is None else model_hash(teacher.network)

    def learn(number: int) -> TrainingReport:
        own = replace(options, seed=options.seed + number)
        at = beside(checkpoint, str(number))

        def told(done: int, steps: int, loss: float) -> None:
            if on_step:
                on_step(number * steps + done, runs * steps, loss)

        with speaker_offsets(model, samples) if own.speaker_rate else nullcontext():
            return fit(speech, samples, own, at, told, origin=origin)

    reports = _mean_of_runs(model, learn, runs)
    if encoder_share < 1:
        with torch.no_grad():
            for tensor in _encoder_outputs(model).values():
                tensor.mul_(encoder_share)
        saml.round_experts()
    return SpeakerProfile.of(
        model,
        speaker="pretrained",
        model=speech.name,
        method="SAML pretraining",
        date=datetime.date.today().isoformat(),
        speakers=len(by_speaker(utterances)),
        utterances=len(samples),
        seconds=round(sum(s.seconds for s in samples), 1),
        steps=sum(report.steps for report in reports),
        loss=round(fmean(report.last_loss for report in reports), 4),
        encoder_share=encoder_share,
        runs=runs,
    )


def _mean_of_runs(
    model: Any, learn: Callable[[int], TrainingReport], runs: int
) -> list[TrainingReport]:
    """Experts that learn several times from where they are end as the mean of what they learnt."""
    saml = compression_of(model)
    own = saml.experts()
    total = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    reports = []
    for number in range(runs):
        with saml.snapshot():
            reports.append(learn(number))
            for name, tensor in own.items():
                total[name] += tensor.detach()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(total[name] / runs)
    saml.round_experts()
    return reports


def _start(
    model: Any, teacher: SpeechModel | None, samples: Sequence[Sample], options: TrainingOptions
) -> None:
    """Put experts that have learnt nothing at their start, drawn by the options' seed."""
    with torch.random.fork_rng([]):  # the caller's state comes back; all is drawn on the CPU
        torch.default_generator.manual_seed(options.seed)
        if starts_from_error(model):
            if teacher is not None:
                start_experts(model, teacher.network, input_moments(teacher, samples, options))
        elif _is_fresh(model):
            for module in model.modules():
                if isinstance(module, SAMLLinear):
                    module.start_as_lora()


def _is_fresh(model: Any) -> bool:
    """Whether all experts add nothing yet, as a LoRA does before it has learnt."""
    outputs = (t for n, t in compression_of(model).experts().items() if n.endswith("lora_b"))
    return not any(tensor.any() for tensor in outputs)


def _encoder_outputs(model: Any) -> dict[str, Tensor]:
    """The half of each of the encoder's experts that starts at zero, B, by name."""
    experts = compression_of(model).experts()
    return {n: t for n, t in experts.items() if "encoder" in n.split(".") and n.endswith("lora_b")}


def _share(model: Any, wanted: float | None) -> float:
    """What share of its encoder's experts is kept: half of what starts elsewhere says nothing."""
    from_nothing = not starts_from_error(model) and _is_fresh(model)
    if wanted is None:
        return ENCODER_SHARE if from_nothing and _encoder_outputs(model) else 1.0
    if not 0 <= wanted <= 1:
        raise SAMLError(f"pretrain: an encoder share of {wanted}; give one from 0 to 1")
    if wanted < 1 and not from_nothing:
        raise SAMLError(
            f"pretrain: an encoder share of {wanted} of experts that do not start as a LoRA's; "
            "give 1, or expert_init='lora'"
        )
    return wanted
