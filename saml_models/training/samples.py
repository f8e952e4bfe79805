"""Utterances -> clips with the text that training aims at."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from saml_kernels.errors import SAMLError
from saml_kernels.files import read_json, write_json
from saml_models.compress.layers import model_hash
from saml_models.data.audio import MAX_SECONDS, SAMPLE_RATE
from saml_models.data.corpora import Utterance, by_speaker
from saml_models.models.interface import SpeechModel
from saml_models.models.targets import check_target
from saml_models.text.style import in_model_style, is_bare
from saml_models.training.batches import Sample
from saml_models.transcription.clips import decode_clips

__all__ = ["PER_SPEAKER", "balanced", "training_samples"]

TOGETHER = 256  # clips in memory, where they are not kept
PER_SPEAKER = 200  # utterances at most: one voice of many hours is not many voices


def balanced(utterances: Sequence[Utterance], count: int, seed: int) -> list[Utterance]:
    """At most `count` of each speaker, drawn by the seed, in their order."""
    draw, kept = random.Random(seed), set[str]()
    for own in by_speaker(utterances).values():
        kept |= {u.id for u in draw.sample(own, min(count, len(own)))}
    return [u for u in utterances if u.id in kept]


def training_samples(
    speech: SpeechModel,
    utterances: Sequence[Utterance],
    keep_audio: bool = True,
    skip_long: bool = False,
    heard: Path | None = None,
    language: str | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Clips and targets for `fit`; bare transcripts borrow the model's own case and punctuation.

    To a multilingual Whisper they are all in one language.

    Args:
        speech: transcribes the clips whose text is bare, to find the style.
        utterances: to train on.
        keep_audio: hold the audio in memory; else it is read again in every epoch.
        skip_long: leave out what is longer than 30 s instead of refusing it.
        heard: a JSON file that keeps what the model heard, and from which it is taken again.
        language: its code; None is what the model hears in most of a few.
        on_done: called with (clips prepared, clips in all).

    Raises:
        SAMLError: an utterance without text, longer than 30 s, whose text is longer than the
            decoder, or whose audio cannot be read.
    """
    for utterance in utterances:  # texts first: they cost no time
        if not utterance.text.strip():
            raise SAMLError(f"{utterance.id}: has no text to learn from; give its transcript")
        # Bare text is learnt in the model's own style, which has few words in capitals.
        plain = utterance.text.lower() if is_bare(utterance.text) else utterance.text
        check_target(speech.network, utterance.id, speech.token_ids(plain, None)[0])
    known = _Heard(heard, speech)
    samples: list[Sample] = []
    for first in range(0, len(utterances), TOGETHER):
        kept = []
        for utterance in utterances[first : first + TOGETHER]:
            clip = utterance.load()
            seconds = len(clip) / SAMPLE_RATE
            if seconds <= MAX_SECONDS:
                kept.append((utterance, clip))
            elif not skip_long:
                raise SAMLError(f"{utterance.id}: {seconds:.1f} s long; cut it to 30 s at most")
        if kept and not samples and language is None:
            language = speech.prompt_language([clip for _, clip in kept])
        texts = known.texts(kept, language)
        for (utterance, clip), text in zip(kept, texts, strict=True):
            load = (lambda clip=clip: clip) if keep_audio else utterance.load
            target = in_model_style(utterance.text, text)
            check_target(speech.network, utterance.id, speech.token_ids(target, language)[0])
            seconds, speaker = len(clip) / SAMPLE_RATE, utterance.speaker
            samples.append(Sample(load, seconds, target, language, speaker=speaker))
        if on_done:
            on_done(min(first + TOGETHER, len(utterances)), len(utterances))
    if utterances and not samples:
        raise SAMLError(f"{utterances[0].id}: over 30 s long, as all others; cut to 30 s at most")
    return samples


class _Heard:
    """What a model hears in clips whose text is bare, kept in a file if there is one."""

    def __init__(self, path: Path | None, speech: SpeechModel) -> None:
        self.path, self.speech = path, speech
        self.by = {"model": model_hash(speech.network), "margin": speech.margin}
        self.known: dict[str, str] = {}
        if path is not None and path.is_file():
            found = read_json(path)
            if all(found.get(key) == value for key, value in self.by.items()):
                self.known = {str(k): str(v) for k, v in dict(found.get("heard", {})).items()}

    def texts(
        self, clips: Sequence[tuple[Utterance, np.ndarray]], language: str | None
    ) -> list[str]:
        """For each clip the hypothesis; "" where the text needs none."""
        missing = [(u, clip) for u, clip in clips if is_bare(u.text) and u.id not in self.known]
        heard = decode_clips(self.speech, [clip for _, clip in missing], language=language)
        fresh = {u.id: text for (u, _), text in zip(missing, heard, strict=True)}
        if self.path is not None and fresh:
            self.known |= fresh
            write_json(self.path, self.by | {"heard": self.known})
        both = self.known | fresh
        return [both[u.id] if is_bare(u.text) else "" for u, _ in clips]
