"""Speech to calibrate rounding on: which clips, with which text, and copies of them in noise."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from saml_kernels.errors import SAMLError
from saml_models.data.audio import MAX_SECONDS, SAMPLE_RATE
from saml_models.data.corpora import Utterance, by_speaker
from saml_models.data.noise import BABBLERS, babble, mixed, pink
from saml_models.models.interface import SpeechModel
from saml_models.models.targets import check_target
from saml_models.text.style import in_model_style, is_bare

__all__ = ["CalibrationClip", "choose_utterances", "clips_hash", "prepare_clips"]

CLIPS = 80
NOISES = ("white", "pink", "babble")
SNR = (5.0, 15.0)  # dB, from and to
SHORTEST = 1.0  # seconds


@dataclass(frozen=True)
class CalibrationClip:
    """A clip and what the decoder is given with it.

    Attributes:
        samples: float32 at 16 kHz, up to 30 s.
        tokens: prompt, text and end.
        prompt: how many of them are the prompt.
    """

    samples: npt.NDArray[np.float32]
    tokens: tuple[int, ...]
    prompt: int


def choose_utterances(
    utterances: Sequence[Utterance], count: int = CLIPS, seed: int = 0
) -> list[Utterance]:
    """Some utterances, of as many speakers as there are: one of each in turn, in a random order.

    Raises:
        SAMLError: there is none.
    """
    if not utterances:
        raise SAMLError("calibration: no utterance; give a corpus or a folder with audio")
    draw = random.Random(seed)
    speakers = list(by_speaker(utterances).values())
    draw.shuffle(speakers)
    for own in speakers:
        draw.shuffle(own)
    turns = (u for turn in zip_longest(*speakers) for u in turn if u is not None)
    return [u for u, _ in zip(turns, range(count), strict=False)]


def prepare_clips(
    speech: SpeechModel,
    utterances: Sequence[Utterance],
    seed: int = 0,
    noise: bool = True,
    count: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[CalibrationClip]:
    """Clips and texts, then a copy of each in noise with the same text.

    The text is the transcript, in the model's own case and punctuation where it has none; where
    there is no transcript, it is what the model hears. Clips shorter than a second or longer than
    30 are left out.

    Args:
        speech: at full precision; hears the clips whose text is bare or not there.
        utterances: each in a language of its own.
        seed: of the noise.
        noise: add the copies.
        count: of the clips, copies not counted: the first so many that are not left out; None is
            all.
        on_done: called with 1 after each of them.

    Raises:
        SAMLError: no clip is left, a text is longer than the decoder takes, or audio cannot be
            read.
    """
    found: list[CalibrationClip] = []
    for utterance in utterances:
        if len(found) == count:
            break
        samples = utterance.load()
        if not SHORTEST <= len(samples) / SAMPLE_RATE <= MAX_SECONDS:
            continue
        language = speech.prompt_language([samples])
        text = utterance.text.strip()
        if not text or is_bare(text):
            (heard,) = speech.decode([samples], 1, language)
            text = in_model_style(text, heard) if text else heard
        tokens, prompt = speech.token_ids(text, language)
        check_target(speech.network, utterance.id, tokens)
        found.append(CalibrationClip(samples, tuple(tokens), prompt))
        if on_done:
            on_done(1)
    if not found:
        raise SAMLError("calibration: no clip of 1 to 30 s; give others")
    if noise:
        noisy = _in_noise([clip.samples for clip in found], seed)
        found += [
            CalibrationClip(samples, clip.tokens, clip.prompt)
            for samples, clip in zip(noisy, list(found), strict=True)
        ]
    return found


def clips_hash(clips: Sequence[CalibrationClip]) -> str:
    """SHA-256 (hex) of samples and tokens, in their order."""
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(f"{len(clip.samples)} {clip.prompt} {clip.tokens}".encode())
        digest.update(np.ascontiguousarray(clip.samples).tobytes())
    return digest.hexdigest()


def _in_noise(
    clips: Sequence[npt.NDArray[np.float32]], seed: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Each clip with white, pink or babble noise at 5 to 15 dB."""
    draw = np.random.default_rng(seed)
    for samples in clips:
        kind = NOISES[draw.integers(len(NOISES))]
        if kind == "babble":
            voices = [clips[other] for other in draw.integers(len(clips), size=BABBLERS)]
            noise = babble(voices, len(samples), draw)
        else:
            noise = draw.standard_normal(len(samples))
            if kind == "pink":
                noise = pink(noise)
        yield mixed(samples, noise, draw.uniform(*SNR))
