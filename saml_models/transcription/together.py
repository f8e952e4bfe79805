"""Recordings on their way through one model: in each step, a batch of what they ask for next.

A recording asks for one piece at a time (`SpeechModel.pieces`): a clip, or a window of a long
recording. Pieces of many recordings and speakers share a batch, and who has waited longest comes
first; after a batch for a long recording it is a short one's turn, so that a clip never waits for
more than one, however many long recordings there are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from saml_kernels.errors import SAMLError
from saml_models.data.audio import MAX_SAMPLES, MAX_SECONDS, SAMPLE_RATE
from saml_models.models.interface import DecodingOptions, Piece, SpeechModel
from saml_models.runtime.threads import shared_cores
from saml_models.speakers.mixing import hears_short_windows, mixed_batch
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.transcript import Segment, Transcript
from saml_models.transcription.clips import decode_clips

__all__ = ["Passage", "Together"]


def _ignored(*told: Any) -> None:
    pass


class Passage:
    """One recording, as far as it has been heard.

    Attributes:
        is_done: there is a transcript, or an error.
        seconds: of the recording.
        profile: who is heard in it, or None.
    """

    def __init__(
        self,
        speech: SpeechModel,
        clip: npt.NDArray[np.float32],
        profile: SpeakerProfile | None,
        options: DecodingOptions,
        on_progress: Callable[[float, float], None],
        on_text: Callable[[str], None],
    ) -> None:
        self.seconds, self.profile, self.options = len(clip) / SAMPLE_RATE, profile, options
        self.is_done = False
        self.since = 0  # the step after which it began to wait
        self._on_progress, self._on_text = on_progress, on_text
        self._transcript: Transcript | None = None
        self._error: BaseException | None = None
        self._steps = self._begin(speech, clip)
        self.piece: Piece | None = None
        self.answer(None)

    def answer(self, heard: Any) -> None:
        """Go on to the next piece, given what was heard in this one."""
        try:
            self.piece = self._steps.send(heard)
        except StopIteration as stop:
            self.is_done, self.piece, self._transcript = True, None, stop.value
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End it without a transcript."""
        self.is_done, self.piece, self._error = True, None, error
        self._steps.close()

    def result(self) -> Transcript:
        """The transcript of a passage that is done; raises what went wrong."""
        if self._error is not None:
            raise self._error
        assert self._transcript is not None
        return self._transcript

    def _begin(
        self, speech: SpeechModel, clip: npt.NDArray[np.float32]
    ) -> Generator[Piece, Any, Transcript]:
        options, seconds = self.options, self.seconds
        code = options.language
        if code is None:
            code = yield Piece("language", clip[:MAX_SAMPLES])
        assert code is not None
        if options.plain and len(clip) <= MAX_SAMPLES:
            text = yield Piece("plain", clip, code)
            segments = [Segment(0, 0.0, seconds, text)] if text else []
        else:
            text, segments = yield from speech.pieces(
                clip, code, options, self._on_progress, self._on_text
            )
        self._on_text(text)
        self._on_progress(seconds, seconds)
        hash = None if self.profile is None else self.profile.hash
        return Transcript(text, code, round(seconds, 3), segments, hash)


class Together:
    """The passages of one model; one thread's alone, and the model in evaluation mode."""

    def __init__(self, speech: SpeechModel, batch_size: int) -> None:
        """Have `batch_size` pieces in a batch at most, divided by the beam size."""
        self.speech, self.batch_size = speech, batch_size
        self._going: list[Passage] = []
        self._step = 0
        self._was_long = False  # who the last step was for

    def __len__(self) -> int:
        """Passages that are not done."""
        return len(self._going)

    def add(
        self,
        clip: npt.NDArray[np.float32],
        profile: SpeakerProfile | None = None,
        options: DecodingOptions | None = None,
        on_progress: Callable[[float, float], None] = _ignored,
        on_text: Callable[[str], None] = _ignored,
    ) -> Passage:
        """Begin with a recording.

        Args:
            clip: float32 [samples] at 16 kHz.
            profile: who is heard in it; None is the model as it is.
            options: of decoding, as by `language_code`.
            on_progress: called with (seconds done, seconds in all) after each piece.
            on_text: called with all the text so far, after each piece that adds to it.

        Raises:
            SAMLError: the profile is of another model, or the model cannot do what is asked.
        """
        if profile is not None:
            profile.check(self.speech.network)
        passage = Passage(
            self.speech, clip, profile, options or DecodingOptions(), on_progress, on_text
        )
        passage.since = self._step - 1  # before those that had their turn just now
        if passage.is_done:
            passage.result()  # raises what is wrong with it
        self._going.append(passage)
        return passage

    def drop(self, passage: Passage) -> None:
        """Forget a passage that nobody waits for any more."""
        if passage in self._going:
            self._going.remove(passage)
            passage.fail(SAMLError("transcription: cancelled"))

    def step(self) -> list[Passage]:
        """Decode one batch.

        Returns:
            The passages that had a piece in it.
        """
        batch = self._chosen()
        if not batch:
            return []
        self._step += 1
        with self.speech.evaluating(), shared_cores(self.speech.network):
            self._heard(batch)
        for passage in batch:
            passage.since = self._step
        self._going = [passage for passage in self._going if not passage.is_done]
        return batch

    def _chosen(self) -> list[Passage]:
        """Who has waited longest, and those of the same kind nearest to it in length."""
        if not self._going:
            return []
        is_long = {passage: passage.seconds > MAX_SECONDS for passage in self._going}

        def rank(passage: Passage) -> tuple[bool, int]:
            return self._was_long and is_long[passage], passage.since

        first = min(self._going, key=rank)
        kind = self._kind(first)
        alike = sorted((p for p in self._going if self._kind(p) == kind), key=rank)
        self._was_long = is_long[first]
        size = max(1, self.batch_size // first.options.beam_size)
        if kind[0] == "plain":
            alike.sort(key=lambda passage: len(_piece(passage).clip))
            at = alike.index(first)
            start = max(0, min(at - size // 2, len(alike) - size))
            return alike[start : start + size]
        return alike[: self.speech.heard_at_once([_piece(p) for p in alike[:size]])]

    def _kind(self, passage: Passage) -> tuple[Any, ...]:
        piece, network = _piece(passage), self.speech.network
        if piece.kind == "alone":
            return (piece.kind, id(passage))
        saml = getattr(network, "saml", None)
        mixed = saml is not None and saml.can_mix
        profile = passage.profile
        voice = hears_short_windows(network, profile) if mixed else id(profile)
        options = passage.options
        if piece.kind == "plain":
            return (piece.kind, voice, id(options.own_words), piece.language, options.beam_size)
        return (piece.kind, voice, id(options.own_words))

    def _heard(self, batch: Sequence[Passage]) -> None:
        """Answer the passages; where the batch fails, each by itself."""
        try:
            found = self._decoded(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].fail(error)
                return
            for passage in batch:
                self._heard([passage])
            return
        for passage, heard in zip(batch, found, strict=True):
            passage.answer(heard)

    def _decoded(self, batch: Sequence[Passage]) -> list[Any]:
        pieces = [_piece(passage) for passage in batch]
        profiles = [passage.profile for passage in batch]
        if pieces[0].kind != "plain":
            with mixed_batch(self.speech.network, profiles):
                return self.speech.hear(pieces)
        beams = batch[0].options.beam_size
        return decode_clips(
            self.speech,
            [piece.clip for piece in pieces],
            beam_size=beams,
            language=pieces[0].language,
            batch_size=len(batch) * beams,
            speakers=profiles,
            own_words=batch[0].options.own_words,
        )


def _piece(passage: Passage) -> Piece:
    assert passage.piece is not None
    return passage.piece
