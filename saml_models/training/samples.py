"""Utterances -> clips with the text that training aims at."""

from __future__ import annotations

from collections.abc import Sequence

from saml_kernels.errors import SAMLError
from saml_models.data.audio import MAX_SECONDS, SAMPLE_RATE
from saml_models.data.corpora import Utterance
from saml_models.models.interface import SpeechModel
from saml_models.models.targets import check_target
from saml_models.text.style import in_model_style, is_bare
from saml_models.training.batches import Sample
from saml_models.transcription.clips import decode_clips

__all__ = ["training_samples"]


def training_samples(
    speech: SpeechModel,
    utterances: Sequence[Utterance],
    keep_audio: bool = True,
    skip_long: bool = False,
) -> list[Sample]:
    """Clips and targets for `fit`; bare transcripts borrow the model's own case and punctuation.

    To a multilingual Whisper they are all in one language, the one it hears in most of a few.

    Args:
        speech: transcribes the clips, to find the style.
        utterances: to train on.
        keep_audio: hold the audio in memory; else it is read again in every epoch.
        skip_long: leave out what is longer than 30 s instead of refusing it.

    Raises:
        SAMLError: an utterance without text, longer than 30 s, whose text is longer than the
            decoder, or whose audio cannot be read.
    """

    def check(utterance: Utterance, text: str, language: str | None) -> None:
        check_target(speech.network, utterance.id, speech.token_ids(text, language)[0])

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
    language = speech.prompt_language(clips) if clips else None
    hypotheses = decode_clips(speech, clips, language=language)
    for utterance, clip, text in zip(kept, clips, hypotheses, strict=True):
        load = (lambda clip=clip: clip) if keep_audio else utterance.load
        target = in_model_style(utterance.text, text)
        check(utterance, target, language)
        samples.append(Sample(load, len(clip) / SAMPLE_RATE, target, language))
    return samples
