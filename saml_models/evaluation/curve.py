"""Word error rate against how many utterances of a speaker were learnt from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from saml_kernels.errors import SAMLError
from saml_models.data.corpora import Utterance
from saml_models.evaluation.comparisons import rate_interval, ratio_interval
from saml_models.evaluation.parts import Parts, run_of
from saml_models.evaluation.protocol import Fold
from saml_models.models.registry import bind
from saml_models.text.wer import WordErrors, pooled, word_errors
from saml_models.training.adapt import adapt
from saml_models.training.options import TrainingOptions
from saml_models.transcription.clips import decode_clips

__all__ = ["COUNTS", "Curve", "curve_folds", "learning_curve"]

COUNTS = (5, 10, 20, 40, 80)
TESTED = 0.25  # of a speaker's utterances, at least


@dataclass
class Curve:
    """Errors of each speaker's test utterances, by how many others were learnt from; 0: none.

    `unused` counts the speakers whose profile the guard did not let be used.
    """

    errors: dict[int, dict[str, list[WordErrors]]] = field(default_factory=dict)
    unused: dict[int, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: rates in per cent, and ratios to what the same speakers' unadapted rate is.

        The 95 % intervals are those of `rate_interval` and `ratio_interval`.
        """
        speakers = {
            name: {
                str(count): round(pooled(own[name]).wer, 3)
                for count, own in self.errors.items()
                if name in own
            }
            for name in self.errors[0]
        }
        return {"curve": [self._point(count) for count in self.errors], "speakers": speakers}

    def _point(self, count: int) -> dict[str, Any]:
        own = self.errors[count]
        owners = [name for name, errors in own.items() for _ in errors]
        after = [one for errors in own.values() for one in errors]
        before = [one for name in own for one in self.errors[0][name]]
        return {
            "utterances": count,
            "speakers": len(own),
            "unused": self.unused.get(count, 0),
            "wer": round(pooled(after).wer, 3),
            "interval_95": rate_interval(owners, after),
            "unadapted": round(pooled(before).wer, 3),
            "ratio_interval_95": ratio_interval(owners, after, before),
        }


def curve_folds(
    speakers: Mapping[str, Sequence[Utterance]], counts: Sequence[int] = COUNTS
) -> dict[int, list[Fold]]:
    """Folds by how many utterances are learnt from, a speaker's first ones.

    A speaker is tested on the same utterances at every count: those after the largest count that
    leaves a quarter of them, which is as far as this speaker goes.

    Args:
        speakers: utterances by speaker, in file order.
        counts: utterances to learn from.

    Raises:
        SAMLError: a count is below 1, or a speaker has too few utterances for the smallest.
    """
    wanted = sorted(set(counts))
    if not wanted or wanted[0] < 1:
        raise SAMLError(f"--curve {','.join(map(str, counts))}: expected counts of at least 1")
    found: dict[int, list[Fold]] = {count: [] for count in wanted}
    for name, said in speakers.items():
        own = [k for k in wanted if len(said) - k >= max(1, TESTED * len(said))]
        if not own:
            raise SAMLError(
                f"speaker {name}: {len(said)} utterances; too few to learn from {wanted[0]} and "
                "test on a quarter"
            )
        for count in own:
            found[count].append(Fold(name, list(said[:count]), list(said[own[-1] :])))
    return {count: folds for count, folds in found.items() if folds}


def learning_curve(
    saml: tuple[Any, Any],
    plan: Mapping[int, Sequence[Fold]],
    options: TrainingOptions | None = None,
    *,
    guard: bool = True,
    beam_size: int = 1,
    language: str | None = None,
    scoring: str = "whisper",
    checkpoint: Path | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Curve:
    """Word errors of the pretrained experts and of adaptation with ever more utterances.

    Args:
        saml: a model with SAML layers and pretrained experts, and its processor.
        plan: from `curve_folds`.
        options: of the adaptation; the defaults unless given.
        guard, beam_size, language, scoring, checkpoint: as for `protocol.evaluate`.
        on_done: called with the number of adaptations done, after each.

    Raises:
        SAMLError: as `adapt`, or a language that the model does not know.
    """
    curve = Curve({0: {}})
    speech = bind(*saml)
    code = None if language is None else speech.language_code(language, "transcribe")
    parts = Parts(
        checkpoint,
        lambda: run_of(
            [saml[0]], [fold for folds in plan.values() for fold in folds], options,
            guard=guard, beam_size=beam_size, language=code, scoring=scoring,
        ),
    )  # fmt: skip

    def errors(fold: Fold) -> list[tuple[int, ...]]:
        clips = [u.load() for u in fold.test]
        heard = decode_clips(speech, clips, beam_size=beam_size, language=code)
        return [astuple(e) for e in word_errors([u.text for u in fold.test], heard, scoring)]

    def learnt(fold: Fold) -> dict[str, Any]:
        profile = adapt(*saml, fold.train, options, skip_long=True, guard=guard)
        with profile.applied(saml[0]):
            return {"used": profile.about.get("adapted", True), "errors": errors(fold)}

    for count, folds in plan.items():
        curve.errors[count], curve.unused[count] = {}, 0
        for fold in folds:
            name = fold.speaker
            before = parts.part(f"0 {name}", partial(errors, fold))
            after = parts.part(f"{count} {name}", partial(learnt, fold))
            curve.errors[0][name] = [WordErrors(*one) for one in before]
            curve.errors[count][name] = [WordErrors(*one) for one in after["errors"]]
            curve.unused[count] += not after["used"]
            if on_done:
                on_done(1)
    return curve
