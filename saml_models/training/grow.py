"""A Conformer grown from a Whisper: its new branches learn first, then its whole encoder gently.

The decoder stays as it is, and so does what it expects of the encoder: half of what is learnt is
the Whisper's own answer to the clip without noise, where that is right. In the end the weights are
put between the Whisper's, whose branches are zero, and those that were learnt: what was learnt of
some voices then costs others less (Wortsman et al., arXiv 2109.01903). As a control, the Whisper's
own encoder learns from the same for as many epochs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from saml_kernels.errors import SAMLError
from saml_models.data.corpora import Utterance
from saml_models.models.interface import QUANTISED_MARGIN
from saml_models.models.registry import bind
from saml_models.models.whisper.conformer import ConformerWhisper, new_branches, scale_branches
from saml_models.models.whisper.speech_model import WhisperSpeechModel
from saml_models.training.checkpoint import beside
from saml_models.training.loop import fit
from saml_models.training.options import TrainingOptions, TrainingReport
from saml_models.training.samples import PER_SPEAKER, balanced, training_samples
from saml_models.training.teacher import taught

__all__ = ["Growth", "grow_conformer"]

SHARE = 0.6  # more of it cost voices without an accent words
WINDOW_MARGIN = 2.0  # seconds of silence after a clip; after one second it heard fewer words right

# It will hear clips with a second after them, and now and then hears more silence.
WINDOWS = (0.5, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 10.0)

BRANCHES = TrainingOptions(learning_rate=5e-4, epochs=2, noise=0.5, margins=WINDOWS, teacher=0.5)
# Another seed: the same clips come in other batches, other noise and other windows.
ENCODER = replace(BRANCHES, learning_rate=5e-5, epochs=1, average=0.3, seed=1)


@dataclass(frozen=True)
class Growth:
    """How a Conformer is grown.

    Attributes:
        branches: of the new branches; no epochs of it train none.
        encoder: of the whole encoder after that, and of a control throughout; its `teacher` is the
            Whisper's share in both.
        sizes: `ConformerWhisperConfig`'s own values.
        share: of what was learnt that is kept, 0 to 1.
    """

    branches: TrainingOptions = BRANCHES
    encoder: TrainingOptions = ENCODER
    sizes: dict[str, int] = field(default_factory=dict)
    share: float = SHARE


def grow_conformer(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    growth: Growth | None = None,
    *,
    control: bool = False,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_heard: Callable[[int, int], None] | None = None,
    on_taught: Callable[[int, int], None] | None = None,
) -> tuple[Any, list[TrainingReport]]:
    """Train a Conformer that starts as `model`, on utterances of many speakers.

    Args:
        model: a Whisper at full precision; left as it is.
        processor: of that model.
        utterances: each with text; what is longer than 30 s is left out, and so are those of one
            speaker beyond `PER_SPEAKER`.
        growth: `Growth()` unless given.
        control: train a copy of the Whisper instead, its encoder alone, for as many epochs.
        checkpoint: a file to resume from if the run is killed; each of the two trainings adds its
            number to the name.
        on_step: called with (steps done, steps in all, loss), in all of one training.
        on_heard: called before that with (clips whose style was found, clips in all).
        on_taught: called then with (clips that the Whisper heard as a teacher, clips in all).

    Returns:
        The trained model in evaluation mode, and a report of each training.

    Raises:
        SAMLError: no Whisper at full precision, nothing to learn from, or bad audio.
    """
    growth = growth or Growth()
    kind = type(model).__name__
    speech = bind(model, processor)
    if type(speech) is not WhisperSpeechModel or hasattr(model, "saml"):
        raise SAMLError(f"{kind}: a Conformer grows from a Whisper at full precision")
    if not utterances:
        raise SAMLError("grow: no utterances; give speech of many speakers with its text")
    if not 0 <= growth.share <= 1:
        raise SAMLError(f"grow: a share of {growth.share} of what is learnt; give one from 0 to 1")
    with _windows(model, QUANTISED_MARGIN):  # half the time of whole ones, for style alone
        samples = training_samples(
            speech,
            balanced(utterances, PER_SPEAKER, growth.branches.seed),
            keep_audio=False,
            skip_long=True,
            heard=beside(checkpoint, "heard.json"),
            on_done=on_heard,
        )
    share = growth.encoder.teacher
    if share:
        kept = beside(checkpoint, "teacher.safetensors")
        samples = taught(speech, samples, share, kept, on_taught)
    grown: Any
    if control:
        grown = copy.deepcopy(model)
    else:
        with torch.random.fork_rng([]):  # the caller's state comes back; all is drawn on the CPU
            torch.default_generator.manual_seed(growth.branches.seed)
            grown = ConformerWhisper.grown_from(model, **growth.sizes)
    encoder = {f"model.encoder.{name}" for name, _ in grown.model.encoder.named_parameters()}
    encoder.discard("model.encoder.embed_positions.weight")  # sinusoids
    if control:
        epochs = growth.branches.epochs + growth.encoder.epochs
        trainings = [(encoder, replace(growth.encoder, epochs=epochs))]
    else:
        trainings = [(set(new_branches(grown)), growth.branches), (encoder, growth.encoder)]
    reports = []
    for number, (names, options) in enumerate(trainings, start=1):
        _learn_only(grown, names)
        file = beside(checkpoint, str(number))
        reports.append(fit(bind(grown, processor), samples, options, file, on_step))
    _keep(grown, model, growth.share)
    grown.config.window_margin = min(WINDOW_MARGIN, max(growth.encoder.margins))
    return grown.requires_grad_(False).eval(), reports


@contextmanager
def _windows(whisper: Any, margin: float) -> Iterator[None]:
    """Hear clips with so many seconds after them."""
    settings = vars(whisper.config)
    before = settings.copy()
    whisper.config.window_margin = margin
    try:
        yield
    finally:
        settings.clear()
        settings.update(before)


@torch.no_grad()
def _keep(grown: Any, whisper: Any, share: float) -> None:
    """Put weights between the Whisper's and those learnt, a new branch between nothing and it."""
    before = dict(whisper.named_parameters())
    for name, parameter in grown.named_parameters():
        if name in before:
            torch.lerp(before[name].to(parameter), parameter, share, out=parameter)
    scale_branches(grown, share)


def _learn_only(model: Any, names: Collection[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
