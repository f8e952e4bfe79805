"""`Engine`: one thread that owns a model, and a bounded queue of recordings before it.

Whoever waits is decoded together (`transcription.together`), whoever they are. Nothing here knows
of HTTP; the same engine runs beside a web server and in a Ray Serve replica.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from saml_kernels.errors import SAMLError
from saml_models.models.interface import DecodingOptions, SpeechModel
from saml_models.runtime.allocator import return_freed_memory
from saml_models.runtime.quiet import quiet_transformers
from saml_models.speakers.identify import identify
from saml_models.speakers.profile import SpeakerProfile
from saml_models.text.transcript import Transcript
from saml_models.transcription.together import Passage, Together

__all__ = ["Counts", "Engine", "EngineClosed", "Job", "QueueFull", "ignored"]

Result = TypeVar("Result")

TIDIED = 64  # batches from one return of freed memory to the next: pages are faulted in anew


class QueueFull(SAMLError):
    """As many recordings wait as the engine takes; `retry_after` says when to come back, in s."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} recordings are waiting; try again in {retry_after:.0f} s")
        self.waiting, self.retry_after = waiting, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """From another process, as Ray brings it."""
        return type(self), (self.waiting, self.retry_after)


class EngineClosed(SAMLError):
    """The engine has ended, as it was told to or by an error of the model's."""

    def __init__(self, text: str = "engine: is closed; start another") -> None:
        super().__init__(text)


@dataclass
class Counts:
    """What an engine has done so far.

    Attributes:
        recordings, failed, cancelled: that have ended, each in one of these ways.
        batches, pieces: that were decoded, and clips and windows in them.
        audio: seconds of the recordings that were transcribed.
        busy: seconds in which the model was at work.
    """

    recordings: int = 0
    failed: int = 0
    cancelled: int = 0
    batches: int = 0
    pieces: int = 0
    audio: float = 0.0
    busy: float = 0.0


@dataclass(eq=False)
class Job:
    """A recording that the engine has taken.

    Attributes:
        future: its transcript, or what went wrong.
    """

    clip: npt.NDArray[np.float32] | None
    profile: SpeakerProfile | None
    options: DecodingOptions
    on_text: Callable[[str], None]
    on_progress: Callable[[float, float], None]
    future: Future[Transcript] = field(default_factory=Future)
    cancelled: bool = False

    def __post_init__(self) -> None:
        """Keep the future from being cancelled by others: only the engine ends it."""
        self.future.set_running_or_notify_cancel()


def ignored(*told: Any) -> None:
    """What is told and nobody asks for."""


class Engine:
    """A model's thread; a context manager, within whose block it runs."""

    def __init__(
        self,
        speech: SpeechModel,
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        patience: float = 0.005,
    ) -> None:
        """Take a model, which nobody else may use from now on.

        Args:
            speech: by `registry.bind`; best with SAML layers, for speakers.
            max_batch: clips and windows decoded together.
            max_queue: recordings taken and not done; one more is refused.
            patience: seconds that an idle engine waits for company of the first to come.
        """
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue)):
            if value < 1:
                raise SAMLError(f"{name}: {value}; expected 1 or more")
        self.speech, self.counts = speech, Counts()
        self.max_batch, self.max_queue, self.patience = max_batch, max_queue, patience
        self._inbox: list[Job] = []
        self._errands: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._jobs: set[Job] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="saml-engine", daemon=True)

    def __enter__(self) -> Engine:
        """Start the model's thread."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """As `close`."""
        self.close()

    @property
    def waiting(self) -> int:
        """Recordings taken and not done."""
        return len(self._jobs)

    @property
    def is_alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread.is_alive()

    def language_code(self, language: str | None, task: str = "transcribe") -> str | None:
        """As `SpeechModel.language_code`; from any thread."""
        return self.speech.language_code(language, task)

    def check_room(self) -> None:
        """Raise QueueFull or EngineClosed where one more recording would be refused."""
        self._check_open()
        if len(self._jobs) >= self.max_queue:
            raise QueueFull(len(self._jobs), self._seconds_left())

    def submit(
        self,
        clip: npt.NDArray[np.float32],
        profile: SpeakerProfile | None = None,
        options: DecodingOptions | None = None,
        on_text: Callable[[str], None] = ignored,
        on_progress: Callable[[float, float], None] = ignored,
    ) -> Job:
        """Queue a recording; answers at once, from any thread.

        Args:
            clip: float32 [samples] at 16 kHz.
            profile: who speaks; the same object for the same speaker shares its memory.
            options: of decoding.
            on_text: called in the model's thread with all the text so far, as it grows.
            on_progress: called there with (seconds done, seconds in all).

        Raises:
            QueueFull: too many wait.
            EngineClosed: it has ended.
        """
        job = Job(clip, profile, options or DecodingOptions(), on_text, on_progress)
        with self._changed:
            self.check_room()
            self._jobs.add(job)
            self._inbox.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Give up a recording: its place is free at once, its work ends with the window."""
        with self._changed:
            job.cancelled = True
            if job in self._jobs:
                self._jobs.discard(job)
                self.counts.cancelled += 1
            self._changed.notify_all()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Have the model's thread call a function between two batches."""
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            self._check_open()
            self._errands.append((function, future))
            self._changed.notify_all()
        return future

    def identify(
        self, clip: npt.NDArray[np.float32], candidates: Sequence[SpeakerProfile]
    ) -> Future[SpeakerProfile | None]:
        """Who of the candidates speaks, or None; see `speakers.identify`."""

        def chosen() -> SpeakerProfile | None:
            fitting = [one for one in candidates if self._fits(one)]
            return identify(self.speech, clip, fitting).profile if fitting else None

        return self.call(chosen)

    def close(self) -> None:
        """End the thread; what is not done fails with EngineClosed."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _fits(self, profile: SpeakerProfile) -> bool:
        try:
            profile.check(self.speech.network)
        except SAMLError:
            return False
        return True

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed

    def _seconds_left(self) -> float:
        """Until a place may be free, by what a recording has taken so far."""
        done = max(1, self.counts.recordings)
        return max(1.0, min(60.0, self.counts.busy / done * len(self._jobs) / 2))

    def _run(self) -> None:
        going: dict[Passage, Job] = {}
        try:
            with quiet_transformers():
                self._work(Together(self.speech, self.max_batch), going)
        finally:
            with self._changed:
                self._closing = True
                left = [*self._inbox, *going.values()]
                errands = [future for _, future in self._errands]
                self._inbox.clear()
                self._jobs.clear()
                self._errands.clear()
            for job in left:
                job.future.set_exception(CancelledError() if job.cancelled else EngineClosed())
            for future in errands:
                future.set_exception(EngineClosed())

    def _work(self, together: Together, going: dict[Passage, Job]) -> None:
        while self._wait(together):
            self._take(together, going)
            for passage, job in list(going.items()):
                if job.cancelled:
                    del going[passage]
                    together.drop(passage)
                    job.future.set_exception(CancelledError())
            began = time.monotonic()
            heard = together.step()
            if not heard:
                continue
            self.counts.batches += 1
            self.counts.pieces += len(heard)
            self.counts.busy += time.monotonic() - began
            for passage in heard:
                if passage.is_done:
                    self._end(going.pop(passage), passage)
            if self.counts.batches % TIDIED == 0:
                return_freed_memory()

    def _wait(self, together: Together) -> bool:
        """Until there is something to do; False where the engine closes."""
        with self._changed:
            while not (self._inbox or self._errands or len(together) or self._closing):
                self._changed.wait()
            if self._inbox and not len(together):
                end = time.monotonic() + self.patience
                while len(self._inbox) < self.max_batch and not self._closing:
                    if not self._changed.wait(max(0.0, end - time.monotonic())):
                        break
            return not self._closing

    def _take(self, together: Together, going: dict[Passage, Job]) -> None:
        """Run errands, and begin with what has come."""
        with self._changed:
            inbox, self._inbox = self._inbox, []
            errands, self._errands = self._errands, []
        for function, future in errands:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        for job in inbox:
            if job.cancelled:
                job.future.set_exception(CancelledError())
                continue
            clip, job.clip = job.clip, None  # the passage holds what it still needs
            assert clip is not None
            try:
                passage = together.add(clip, job.profile, job.options, job.on_progress, job.on_text)
            except Exception as error:
                self._finish(job, failed=True)
                job.future.set_exception(error)
                continue
            going[passage] = job

    def _end(self, job: Job, passage: Passage) -> None:
        try:
            transcript = passage.result()
        except Exception as error:
            self._finish(job, failed=True)
            job.future.set_exception(error)
            return
        self.counts.audio += passage.seconds
        self._finish(job, failed=False)
        job.future.set_result(transcript)

    def _finish(self, job: Job, failed: bool) -> None:
        """Its place is free."""
        with self._changed:
            if job not in self._jobs:
                return
            self._jobs.discard(job)
            if failed:
                self.counts.failed += 1
            else:
                self.counts.recordings += 1
