"""A speaker's voice without transcripts: the model's own, where it is sure of them.

Each round labels the clips by beam search with the latest profile, keeps those that it is sure of,
and adapts anew from the pretrained experts. Clips whose text is known are learnt from beside them:
they make the profile that labels first, and the guard is that of `adapt`.

Without such clips nobody knows the words of the held-back ones either, so the guard asks for the
next best thing: a profile that helps hears the same words at slightly other speeds. That is
evidence, not a word error rate: it can keep a profile that does not help, and a model that says
nothing at all would agree with itself, which is why words must not be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from saml_kernels.errors import SAMLError
from saml_models.data.audio import MAX_SAMPLES, SAMPLE_RATE, at_speed
from saml_models.data.corpora import Utterance
from saml_models.data.pauses import cut_at_pauses
from saml_models.models.interface import Clip, SpeechModel
from saml_models.models.registry import bind
from saml_models.speakers.mixing import mixed_batch
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.wer import pooled, word_errors
from saml_models.training.adapt import adapt
from saml_models.training.checkpoint import beside
from saml_models.training.options import TrainingOptions
from saml_models.transcription.clips import decode_clips
from saml_models.transcription.confidence import confidence

__all__ = ["Filter", "Label", "adapt_unsupervised", "disagreement", "pseudo_labels"]

SPEEDS = (0.93, 1.07)  # of the guard
LEAST = 5  # clips: four to learn from, one to hold back
FEWEST_WORDS = 0.8  # of those heard before: a voice that is unlike others has words that are none


@dataclass(frozen=True)
class Filter:
    """Which labels are believed.

    Attributes:
        log_prob: mean log-probability of a label's tokens at least, in nats.
        entropy: mean entropy of its tokens at most, in nats.
        agreement: share of words on which greedy and beam search agree at least.
        share: where fewer clips pass, this share of the most probable labels is taken instead.
        seconds: of clips at most, the most probable labels first: learning takes its time in
            proportion.
    """

    log_prob: float = -0.5
    entropy: float = 1.0
    agreement: float = 0.8
    share: float = 0.5
    seconds: float = 600.0


@dataclass(frozen=True)
class Label:
    """What the model heard in a clip, and how sure it is: see `Filter`."""

    text: str
    log_prob: float
    entropy: float
    agreement: float


def pseudo_labels(
    speech: SpeechModel,
    clips: Sequence[Clip],
    profile: SpeakerProfile | None = None,
    beam_size: int = 4,
    language: str | None = None,
) -> list[Label]:
    """The beam's text for each clip (at most 30 s) in a language, heard with `profile`."""
    hear = partial(decode_clips, speech, clips, speakers=[profile] * len(clips), language=language)
    greedy, beams = hear(), hear(beam_size=beam_size)
    labels = []
    with mixed_batch(speech.network, [profile]):
        for clip, text, other in zip(clips, beams, greedy, strict=True):
            sure = confidence(speech, clip, text, language)
            apart = word_errors([text], [other])[0].wer if text else 100.0
            labels.append(Label(text, sure.log_prob, sure.entropy, max(0.0, 1 - apart / 100)))
    return labels


def believed(labels: Sequence[Label], seconds: Sequence[float], rule: Filter) -> list[int]:
    """Of clips that last so long, those whose labels are learnt from, in order.

    None without words is. The first one is, however long.
    """
    spoken = [i for i, label in enumerate(labels) if label.text.strip()]
    passing = [
        i
        for i in spoken
        if labels[i].log_prob >= rule.log_prob
        and labels[i].entropy <= rule.entropy
        and labels[i].agreement >= rule.agreement
    ]
    least = max(1, int(len(spoken) * rule.share)) if spoken else 0
    if len(passing) < least:
        passing = sorted(spoken, key=lambda i: -labels[i].log_prob)[:least]
    surest = sorted(passing, key=lambda i: -labels[i].log_prob)
    ends = np.cumsum([seconds[i] for i in surest])
    return sorted(i for n, i in enumerate(surest) if n == 0 or ends[n] <= rule.seconds)


def disagreement(
    speech: SpeechModel,
    clips: Sequence[Clip],
    profile: SpeakerProfile | None,
    language: str | None = None,
) -> tuple[float, int]:
    """Per cent of words that change with the clips' speed, and the words heard at their own."""
    hear = partial(decode_clips, speech, speakers=[profile] * len(clips), language=language)
    own = hear(clips)
    changed = []
    for speed in SPEEDS:
        moved = [at_speed(clip, speed)[:MAX_SAMPLES] for clip in clips]
        changed += word_errors(own, hear(moved))
    return float(pooled(changed).wer), sum(len(text.split()) for text in own)


def adapt_unsupervised(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    options: TrainingOptions | None = None,
    *,
    known: Sequence[Utterance] = (),
    speaker: str | None = None,
    kind: str = "experts",
    rounds: int | None = None,
    rule: Filter | None = None,
    guard: bool = True,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> SpeakerProfile:
    """Learn one speaker from recordings alone, or beside a few clips whose text is known.

    Args:
        model: treated by `apply_saml`, with pretrained experts; left as it was.
        processor: of that model.
        utterances: of one speaker, at least five where none is known; their texts, if any, are not
            looked at. What is over 30 s long is cut at its pauses.
        options, speaker, kind, on_step: as for `adapt`.
        known: of the same speaker, each with its text and at most 30 s long.
        rounds: of labelling and learning; None is two, or one after the known clips were learnt.
        rule: which labels are believed.
        guard: from five known clips on, that of `adapt`; with none, every fifth clip is held back,
            and what was learnt is used if it helps there; with one to four there is none.
        checkpoint: as for `training.fit`; each round adds its number to the name.

    Returns:
        The profile; what was learnt where the held-back clips say that it helps, else the
        unadapted one: `about["adapted"]` says which, `about["guard"]` the numbers.

    Raises:
        SAMLError: too few clips, no words in any of them, or as `adapt`.
    """
    rounds = (1 if known else 2) if rounds is None else rounds
    pieces = [piece for one in utterances for piece in cut_at_pauses(one)]
    if rounds < 1 or len(pieces) < (1 if known else LEAST):
        raise SAMLError(
            f"unsupervised: {len(pieces)} clips, {rounds} rounds; expected at least {LEAST} "
            "clips, or one beside some whose text is known, and one round"
        )
    speech = bind(model, processor)
    held = [u.load() for u in pieces[LEAST - 1 :: LEAST]] if guard and not known else []
    learnt = [u for i, u in enumerate(pieces) if not held or i % LEAST != LEAST - 1]
    clips = [u.load() for u in learnt]
    seconds = [len(clip) / SAMPLE_RATE for clip in clips]
    # One for all: a clip that is taken for another language would be learnt in it.
    language = speech.prompt_language([u.load() for u in known] or clips)
    used = []

    def learn(
        number: int, sure: Sequence[Utterance], unsure: Sequence[Utterance], guarded: bool
    ) -> SpeakerProfile:
        at = beside(checkpoint, str(number))
        return adapt(
            model, processor, sure, options, unsure=unsure, speaker=speaker, kind=kind,
            language=language, guard=guarded, checkpoint=at, on_step=on_step,
        )  # fmt: skip

    profile = learn(0, known, (), False) if known else None
    for number in range(1, rounds + 1):
        labels = pseudo_labels(speech, clips, profile, language=language)
        chosen = believed(labels, seconds, rule or Filter())
        if not chosen:
            raise SAMLError("unsupervised: no words were heard in any clip; give clearer speech")
        used.append(len(chosen))
        labelled = [replace(learnt[i], text=labels[i].text) for i in chosen]
        # Without known clips, what would be held back are labels of the model's own.
        profile = (
            learn(number, known, labelled, guard and number == rounds)
            if known
            else learn(number, labelled, (), False)
        )
    assert profile is not None
    notes: dict[str, Any] = {
        "method": f"{'semi-supervised' if known else 'unsupervised'} SAML adaptation",
        "rounds": rounds,
        "clips_believed": used,
    }
    profile = replace(profile, about=profile.about | notes)
    return _unless_useless(speech, profile, held, language) if held else profile


def _unless_useless(
    speech: SpeechModel, profile: SpeakerProfile, held: Sequence[Clip], language: str | None
) -> SpeakerProfile:
    """The profile where held-back clips change less with their speed, else the unadapted one."""
    before, words_before = disagreement(speech, held, None, language)
    after, words_after = disagreement(speech, held, profile, language)
    helps = after < before and words_after >= FEWEST_WORDS * words_before
    about = profile.about | {
        "adapted": helps,
        "guard": {
            "clips": len(held),
            "changed_words_before": round(before, 2),
            "changed_words_after": round(after, 2),
        },
    }
    if helps:
        return replace(profile, about=about)
    del about["short_windows"]  # what the unadapted model hears
    make = SpeakerProfile.of if profile.kind == "experts" else SpeakerProfile.of_gates
    return replace(make(speech.network, **about), embedding=profile.embedding)
