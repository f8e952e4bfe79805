"""A speaker's voice without transcripts: the model's own, where it is sure of them.

Each round labels the clips by beam search with the latest profile, keeps those that it is sure of,
and adapts anew from the pretrained experts. Nobody knows the words of the held-back clips either,
so the guard asks for the next best thing: a profile that helps hears the same words at slightly
other speeds. That is evidence, not a word error rate: it can keep a profile that does not help, and
a model that says nothing at all would agree with itself, which is why words must not be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saml_kernels.errors import SAMLError
from saml_models.data.audio import MAX_SAMPLES, at_speed
from saml_models.data.corpora import Utterance
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


@dataclass(frozen=True)
class Filter:
    """Which labels are believed.

    Attributes:
        log_prob: mean log-probability of a label's tokens at least, in nats.
        entropy: mean entropy of its tokens at most, in nats.
        agreement: share of words on which greedy and beam search agree at least.
        share: where fewer clips pass, this share of the most probable labels is taken instead.
    """

    log_prob: float = -0.5
    entropy: float = 1.0
    agreement: float = 0.8
    share: float = 0.5


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
) -> list[Label]:
    """The beam's text for each clip (at most 30 s), heard with `profile`."""
    speakers = [profile] * len(clips)
    greedy = decode_clips(speech, clips, speakers=speakers)
    beams = decode_clips(speech, clips, speakers=speakers, beam_size=beam_size)
    labels = []
    with mixed_batch(speech.network, [profile]):
        for clip, text, other in zip(clips, beams, greedy, strict=True):
            sure = confidence(speech, clip, text)
            apart = word_errors([text], [other])[0].wer if text else 100.0
            labels.append(Label(text, sure.log_prob, sure.entropy, max(0.0, 1 - apart / 100)))
    return labels


def believed(labels: Sequence[Label], rule: Filter) -> list[int]:
    """The clips whose labels are learnt from, in order; none without words is."""
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
    return sorted(passing)


def disagreement(
    speech: SpeechModel, clips: Sequence[Clip], profile: SpeakerProfile | None
) -> tuple[float, int]:
    """Per cent of words that change with the clips' speed, and the words heard at their own."""
    speakers = [profile] * len(clips)
    own = decode_clips(speech, clips, speakers=speakers)
    changed = []
    for speed in SPEEDS:
        moved = [at_speed(clip, speed)[:MAX_SAMPLES] for clip in clips]
        other = decode_clips(speech, moved, speakers=speakers)
        changed += word_errors(own, other)
    return float(pooled(changed).wer), sum(len(text.split()) for text in own)


def adapt_unsupervised(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    options: TrainingOptions | None = None,
    *,
    speaker: str | None = None,
    kind: str = "experts",
    rounds: int = 2,
    rule: Filter | None = None,
    guard: bool = True,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> SpeakerProfile:
    """Learn one speaker from clips alone; their texts, if any, are not looked at.

    Args:
        model: treated by `apply_saml`, with pretrained experts; left as it was.
        processor: of that model.
        utterances: of one speaker, at least five, each at most 30 s long.
        options, speaker, kind, on_step: as for `adaptation.adapt`.
        rounds: of labelling and learning.
        rule: which labels are believed.
        guard: hold back every fifth clip, and use what was learnt if it helps there.
        checkpoint: as for `training.fit`; each round adds its number to the name.

    Returns:
        The profile; what was learnt where the held-back clips say that it helps, else the
        unadapted one: `about["adapted"]` says which, `about["guard"]` the numbers.

    Raises:
        SAMLError: too few clips, no words in any of them, or as `adapt`.
    """
    if len(utterances) < LEAST or rounds < 1:
        raise SAMLError(
            f"unsupervised: {len(utterances)} clips, {rounds} rounds; expected at least {LEAST} "
            "clips and one round"
        )
    speech = bind(model, processor)
    held = [u.load() for u in utterances[LEAST - 1 :: LEAST]] if guard else []
    learnt = [u for i, u in enumerate(utterances) if not held or i % LEAST != LEAST - 1]
    clips = [u.load() for u in learnt]
    profile: SpeakerProfile | None = None
    used = []
    for number in range(1, rounds + 1):
        labels = pseudo_labels(speech, clips, profile)
        chosen = believed(labels, rule or Filter())
        if not chosen:
            raise SAMLError("unsupervised: no words were heard in any clip; give clearer speech")
        used.append(len(chosen))
        profile = adapt(
            model,
            processor,
            [replace(learnt[i], text=labels[i].text) for i in chosen],
            options,
            speaker=speaker,
            kind=kind,
            guard=False,  # labels that are held back would be the model's own
            checkpoint=beside(checkpoint, str(number)),
            on_step=on_step,
        )
    assert profile is not None
    notes: dict[str, Any] = {
        "method": "unsupervised SAML adaptation",
        "rounds": rounds,
        "clips_believed": used,
    }
    if not held:
        return replace(profile, about=profile.about | notes)
    before, words_before = disagreement(speech, held, None)
    after, words_after = disagreement(speech, held, profile)
    helps = after < before and words_after >= 0.8 * words_before
    notes |= {
        "adapted": helps,
        "guard": {
            "clips": len(held),
            "changed_words_before": round(before, 2),
            "changed_words_after": round(after, 2),
        },
    }
    about = profile.about | notes
    if helps:
        return replace(profile, about=about)
    del about["short_windows"]  # what the unadapted model hears
    make = SpeakerProfile.of if kind == "experts" else SpeakerProfile.of_gates
    return replace(make(model, **about), embedding=profile.embedding)
