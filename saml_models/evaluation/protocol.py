"""The paper's protocol: per speaker, adapt on some utterances and test on the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from saml_kernels.errors import SAMLError
from saml_models.compress.layers import model_hash
from saml_models.data.audio import SAMPLE_RATE
from saml_models.data.corpora import Utterance, short_clips
from saml_models.evaluation.comparisons import made_worse, rate_interval, ratios
from saml_models.evaluation.divergence import Divergence, divergences
from saml_models.evaluation.parts import Parts, run_of
from saml_models.models.interface import SpeechModel
from saml_models.models.loops import is_loop
from saml_models.models.registry import bind
from saml_models.models.targets import target_limit
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.normalise import SCORINGS
from saml_models.text.style import in_model_style
from saml_models.text.wer import WordErrors, pooled, word_errors
from saml_models.training.adapt import adapt
from saml_models.training.options import TrainingOptions
from saml_models.transcription.clips import decode_clips

__all__ = [
    "SYSTEMS",
    "Evaluation",
    "Fold",
    "evaluate",
    "heard_before_and_after",
    "make_folds",
    "other_fold",
    "with_word_errors",
]

# The columns of the table, in order.
SYSTEMS = {
    "full_precision": "full precision",
    "quantised": "quantised",
    "experts": "+ experts",
    "adapted": "+ adaptation",
    "other_speaker": "other speaker's",
}


@dataclass(frozen=True)
class Fold:
    """One speaker's utterances to adapt on and to test on, and to choose an epoch by, if any."""

    speaker: str
    train: list[Utterance]
    test: list[Utterance]
    choose: list[Utterance] = field(default_factory=list)


@dataclass
class Evaluation:
    """Per test utterance, in order: speaker, reference, hypothesis and errors by system."""

    speakers: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    hypotheses: dict[str, list[str]] = field(default_factory=lambda: {s: [] for s in SYSTEMS})
    errors: dict[str, list[WordErrors]] = field(default_factory=lambda: {s: [] for s in SYSTEMS})
    scoring: str = "whisper"  # how the errors were counted
    loops: dict[str, int] = field(default_factory=dict)  # hypotheses that ran into a loop
    size: dict[str, float] = field(default_factory=dict)
    trainable: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    audio_seconds: float = 0.0
    divergence: Divergence | None = None  # of the quantised model from full precision
    diverging: list[str] = field(default_factory=list)  # the speakers of its clips
    guard: list[dict[str, Any]] = field(default_factory=list)  # of each fold: `guard.Verdict`

    def wer(self, system: str, speaker: str | None = None) -> float:
        """Pooled word error rate in per cent, of all or of one speaker."""
        return pooled(self._of(system, speaker)).wer

    def _of(self, system: str, speaker: str | None) -> list[WordErrors]:
        pairs = zip(self.speakers, self.errors[system], strict=True)
        return [e for s, e in pairs if speaker in (None, s)]

    def to_dict(self) -> dict[str, Any]:
        """Everything for JSON; WER in per cent (None: not run), times in seconds, bytes."""
        detail = {}
        systems = [s for s in SYSTEMS if self.errors[s]]
        for system in systems:
            errors = self.errors[system]
            total = pooled(errors)
            detail[system] = {
                "wer": round(total.wer, 3),
                "interval_95": rate_interval(self.speakers, errors),
                "substitutions": total.substitutions,
                "deletions": total.deletions,
                "insertions": total.insertions,
                "words": total.words,
            }
        return {
            "scoring": self.scoring,
            "wer": {s: round(self.wer(s), 3) if s in detail else None for s in SYSTEMS},
            "wer_by_scoring": {name: self._rates(name) for name in SCORINGS},
            "ratios": ratios(self.speakers, self.errors),
            "made_worse": made_worse(self.speakers, self.errors) if "adapted" in detail else [],
            "guard": self.guard,
            "loops": self.loops,
            "divergence": self._divergence(),
            "size": self.size,
            "speakers": {
                speaker: {s: round(self.wer(s, speaker), 3) for s in systems}
                for speaker in dict.fromkeys(self.speakers)
            },
            "speaker_words": {
                speaker: pooled(self._of("full_precision", speaker)).words
                for speaker in dict.fromkeys(self.speakers)
            },
            "detail": detail,
            "trainable_parameters": self.trainable,
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "test_audio_seconds": round(self.audio_seconds, 1),
            "utterances": [
                {
                    "id": self.ids[i],
                    "speaker": self.speakers[i],
                    "reference": self.references[i],
                    **{s: self.hypotheses[s][i] for s in systems},
                }
                for i in range(len(self.ids))
            ],
        }

    def _rates(self, scoring: str) -> dict[str, float | None]:
        """Pooled word error rates in per cent, counted in one of the two ways."""
        return {
            system: round(pooled(word_errors(self.references, said, scoring)).wer, 3)
            if said
            else None
            for system, said in self.hypotheses.items()
        }

    def _divergence(self) -> dict[str, Any] | None:
        """Nats a token, with its interval over speakers, and the share of tokens that agree."""
        found = self.divergence
        if found is None:
            return None
        low, high = found.interval(self.diverging)
        return {
            "kl": round(found.mean, 5),
            "interval_95": [round(low, 5), round(high, 5)],
            "agreement": round(found.agreement, 5),
            "tokens": sum(found.tokens),
        }


def make_folds(
    speakers: dict[str, list[Utterance]],
    adapt_utterances: int | None,
    folds: int,
    choosing: bool = False,
) -> list[Fold]:
    """Split each speaker's utterances, in file order.

    Args:
        speakers: utterances by speaker.
        adapt_utterances: K: adapt on the first K, test on the rest; or None.
        folds: without K, cut into this many parts; each is the test once.
        choosing: the last third of what is adapted on chooses the epoch instead, as SAML's authors
            split a speaker (40 % to learn, 20 % to choose, 40 % to test, arXiv 2406.19706).

    Raises:
        SAMLError: a speaker has too few utterances.
    """
    if adapt_utterances is not None and adapt_utterances < 1:
        raise SAMLError(f"--adapt-utterances {adapt_utterances}: expected at least 1")
    if adapt_utterances is None and folds < 2:
        raise SAMLError(f"--folds {folds}: expected at least 2")
    needed = folds if adapt_utterances is None else adapt_utterances + 1
    plan = []
    for speaker, utterances in speakers.items():
        if len(utterances) < needed:
            raise SAMLError(
                f"speaker {speaker}: {len(utterances)} utterances; expected at least {needed}"
            )
        if adapt_utterances is not None:
            k = adapt_utterances
            plan.append(Fold(speaker, utterances[:k], utterances[k:]))
            continue
        for part in np.array_split(np.arange(len(utterances)), folds):
            test = set(part.tolist())
            train = [u for i, u in enumerate(utterances) if i not in test]
            plan.append(Fold(speaker, train, [utterances[i] for i in sorted(test)]))
    return [_choosing(fold) for fold in plan] if choosing else plan


def _choosing(fold: Fold) -> Fold:
    """The last third of what would be learnt chooses."""
    third = len(fold.train) // 3
    if not third:
        raise SAMLError(
            f"speaker {fold.speaker}: {len(fold.train)} utterances to adapt on; expected at least "
            "3, of which a third chooses the epoch"
        )
    return replace(fold, train=fold.train[:-third], choose=fold.train[-third:])


def evaluate(
    full: tuple[Any, Any],
    quantised: tuple[Any, Any],
    saml: tuple[Any, Any],
    folds: Sequence[Fold],
    options: TrainingOptions | None = None,
    *,
    guard: bool = True,
    beam_size: int = 1,
    language: str | None = None,
    scoring: str = "whisper",
    checkpoint: Path | None = None,
    on_stage: Callable[[str, int], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Evaluation:
    """Word error rates of the five systems on the same test utterances, decoded alike.

    Also how far the quantised model's distribution is from full precision's; see `divergence`.

    Args:
        full: the full-precision model and its processor.
        quantised: a pair too: the same model quantised, without experts.
        saml: likewise, with pretrained experts; every fold adapts from these.
        folds: from `make_folds`; what is longer than 30 s is not learnt from. "other speaker"
            takes the profile of the next speaker's fold; with one speaker it is not run.
        options: of the adaptation; the defaults unless given.
        guard: as for `adapt`; not where a fold chooses an epoch.
        beam_size: of every system.
        language: code or name of what is spoken in the test clips; None lets a multilingual model
            detect it in each.
        scoring: how words are counted, of `SCORINGS`.
        checkpoint: a file of what was heard so far, with texts; a killed run goes on from it.
        on_stage: called with the name and the number of parts of each stage that begins.
        on_done: called with the number of parts done.

    Raises:
        SAMLError: as `adapt`, or a language that the model does not know.

    Example:
        >>> folds = make_folds({"ann": load_corpus("my_clips/")}, 10, 2)  # doctest: +SKIP
        >>> evaluate(full, quantised, saml, folds).wer("adapted")  # doctest: +SKIP
    """
    stage = on_stage or (lambda name, parts: None)
    done = on_done or (lambda parts: None)
    tests = [u for fold in folds for u in fold.test]
    clips = [u.load() for u in tests]
    result = Evaluation(
        scoring=scoring,
        speakers=[fold.speaker for fold in folds for _ in fold.test],
        ids=[u.id for u in tests],
        references=[u.text for u in tests],
        audio_seconds=sum(map(len, clips)) / SAMPLE_RATE,
    )

    speech = bind(*full)
    code = None if language is None else speech.language_code(language, "transcribe")

    ends = np.cumsum([len(fold.test) for fold in folds])
    own_clips = [clips[end - len(fold.test) : end] for fold, end in zip(folds, ends, strict=True)]
    several = len({fold.speaker for fold in folds}) > 1
    lender = [other_fold(folds, i) for i in range(len(folds))] if several else []
    parts = Parts(
        checkpoint,
        lambda: run_of(
            [quantised[0], saml[0]], folds, options,
            guard=guard, beam_size=beam_size, language=code, scoring=scoring,
            full=model_hash(full[0]),
        ),
    )  # fmt: skip

    def hear(system: tuple[Any, Any], clips: Sequence[np.ndarray]) -> list[str]:
        return decode_clips(bind(*system), clips, beam_size=beam_size, language=code, on_done=done)

    def alone(system: tuple[Any, Any]) -> dict[str, Any]:
        started = time.monotonic()
        return {"texts": hear(system, clips), "seconds": time.monotonic() - started}

    def record(system: str, hypotheses: list[str], seconds: float) -> None:
        result.hypotheses[system] = hypotheses
        result.errors[system] = word_errors(result.references, hypotheses, scoring)
        result.loops[system] = sum(in_loop(speech, text) for text in hypotheses)
        result.seconds[system] = seconds

    def adapted(i: int) -> dict[str, Any]:
        """What is heard with the profile of a fold in its clips, and in those it is lent to."""
        times = [time.monotonic()]
        fold = folds[i]
        profile = adapt(*saml, fold.train, options, skip_long=True, choose=fold.choose, guard=guard)
        times.append(time.monotonic())
        with profile.applied(saml[0]):
            own = hear(saml, own_clips[i])
            times.append(time.monotonic())
            others = {str(j): hear(saml, own_clips[j]) for j, k in enumerate(lender) if k == i}
        times.append(time.monotonic())
        took = [after - before for before, after in pairwise(times)]
        return {
            "guard": profile.about.get("guard"), "texts": own, "others": others, "seconds": took
        }  # fmt: skip

    plain = {"full_precision": full, "quantised": quantised, "experts": saml}
    for system, candidate in plain.items():
        stage(SYSTEMS[system], len(clips))
        heard = parts.part(system, partial(alone, candidate), lambda _: done(len(clips)))
        record(system, heard["texts"], heard["seconds"])

    stage("distribution", len(clips))
    apart = parts.part(
        "distribution",
        lambda: _compare(bind(*full), bind(*quantised), clips, code, result, done),
        lambda _: done(len(clips)),
    )
    result.diverging = [result.speakers[i] for i in apart["clips"]]
    if result.diverging:
        result.divergence = Divergence(**apart["divergence"])

    stage(SYSTEMS["adapted"], len(folds) + (1 + several) * len(clips))
    found = []

    def known(kept: dict[str, Any]) -> None:
        done(len(kept["texts"]) + sum(map(len, kept["others"].values())))

    for i, fold in enumerate(folds):
        heard = parts.part(f"fold {i}", partial(adapted, i), known)
        if heard["guard"] is not None:
            result.guard.append({"speaker": fold.speaker, **heard["guard"]})
        found.append(heard)
        done(1)
    learning, own, others = (sum(one["seconds"][n] for one in found) for n in range(3))
    result.seconds["adapting"] = learning
    record("adapted", [text for one in found for text in one["texts"]], own)
    if several:
        texts = [text for j, i in enumerate(lender) for text in found[i]["others"][str(j)]]
        record("other_speaker", texts, others)
    return result


def _compare(
    full: SpeechModel,
    quantised: SpeechModel,
    clips: Sequence[np.ndarray],
    language: str | None,
    result: Evaluation,
    done: Callable[[int], None],
) -> dict[str, Any]:
    """The quantised model's divergence, on texts that fit the decoder; which `clips` those are."""
    language = language or full.prompt_language(clips)
    heard = result.hypotheses["full_precision"]
    texts = [in_model_style(*pair) for pair in zip(result.references, heard, strict=True)]
    most = target_limit(full.network)
    fits = [len(full.token_ids(text, language)[0]) <= most for text in texts]
    chosen = [i for i, fit in enumerate(fits) if fit]
    done(len(clips) - len(chosen))
    apart = Divergence()
    if chosen:
        with full.evaluating(), quantised.evaluating():
            (apart,) = divergences(
                full,
                [quantised],
                [clips[i] for i in chosen],
                [texts[i] for i in chosen],
                margin=quantised.margin,
                language=language,
                on_done=done,
            )
    return {"clips": chosen, "divergence": apart.to_dict()}


def heard_before_and_after(
    profile: SpeakerProfile, model: Any, processor: Any, utterances: Sequence[Utterance]
) -> tuple[list[str], list[str]]:
    """The texts of utterances without a profile, and with it."""
    clips, speech = short_clips(utterances), bind(model, processor)
    before, after = (
        decode_clips(speech, clips, speakers=[who] * len(clips)) for who in (None, profile)
    )
    return before, after


def with_word_errors(
    profile: SpeakerProfile, model: Any, processor: Any, utterances: Sequence[Utterance]
) -> SpeakerProfile:
    """The profile with `wer_before` and `wer_after` (per cent) noted: without it, and with it.

    Args:
        profile: made for `model`.
        model, processor: with the experts that adaptation started from.
        utterances: with text, that it has not learnt from.

    Raises:
        SAMLError: one of them is longer than 30 s.
    """
    references = [u.text for u in utterances]
    before, after = (
        round(float(pooled(word_errors(references, texts)).wer), 2)
        for texts in heard_before_and_after(profile, model, processor, utterances)
    )
    noted = {"wer_before": before, "wer_after": after, "test_utterances": len(utterances)}
    return replace(profile, about=profile.about | noted)


def in_loop(speech: SpeechModel, text: str) -> bool:
    """Whether what a model heard repeats itself to no end; see `models.loops`."""
    ids, prompt = speech.token_ids(text)
    return is_loop(ids[prompt:-1], len(ids))


def other_fold(folds: Sequence[Fold], i: int) -> int:
    """The next fold of another speaker."""
    later = ((i + step) % len(folds) for step in range(1, len(folds)))
    return next(j for j in later if folds[j].speaker != folds[i].speaker)
