"""The engine on several processes and machines, by Ray Serve: `saml serve --engine ray`.

Each replica is an `Engine` with its own model. The speaker is an argument of the request, not a
model's name: Ray's multiplexing would send each speaker to a replica of its own and split the
batches. The web server stays in this process and Ray opens no HTTP port. Ray is told to stay on the
loopback unless it joins a cluster, but its agents were seen to listen on all addresses: keep a
firewall before them.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from saml_kernels.errors import SAMLError, needs, one_line
from saml_models.models.interface import DecodingOptions
from saml_models.models.registry import bind
from saml_models.recogniser import Recogniser
from saml_models.server.engine import Counts, Engine, EngineClosed, Job, QueueFull, ignored
from saml_models.speakers.profile import SpeakerProfile

__all__ = ["RayEngine", "Replica"]

NAME = "saml"
KEPT = 256  # profiles that a replica, and this process for it, remember
OBJECTS = 512 * 2**20  # bytes of Ray's shared memory, where it is started here
WAIT = 2.0  # seconds after which a client may ask a full queue again
_STARTED = 600.0  # seconds in which replicas have to be ready
_LEFT = 5.0  # seconds that cancelled recordings have to end


class Replica:
    """One engine with its model, in a process of Ray's."""

    def __init__(
        self, model: str, experts: str | None, device: str, max_batch: int, max_queue: int
    ) -> None:
        recogniser = Recogniser.load(model, device=device, experts=experts)
        speech = bind(recogniser.model, recogniser.processor)
        self.engine = Engine(speech, max_batch=max_batch, max_queue=max_queue)
        self.engine.__enter__()
        self._profiles: OrderedDict[str, SpeakerProfile] = OrderedDict()

    async def transcribe(
        self,
        clip: npt.NDArray[np.float32],
        profile: SpeakerProfile | None,
        options: DecodingOptions,
    ) -> AsyncIterator[Any]:
        """All the text so far, as it grows, and at last the transcript."""
        loop = asyncio.get_running_loop()
        texts: asyncio.Queue[Any] = asyncio.Queue()

        def on_text(text: str) -> None:
            loop.call_soon_threadsafe(texts.put_nowait, text)

        job = self.engine.submit(np.array(clip), self._same(profile), options, on_text)
        done = asyncio.wrap_future(job.future)
        done.add_done_callback(lambda _: texts.put_nowait(None))
        try:
            while (text := await texts.get()) is not None:
                yield text
            yield done.result()
        finally:
            done.cancel()
            if not job.future.done():
                self.engine.cancel(job)

    async def identify(
        self, clip: npt.NDArray[np.float32], candidates: Sequence[SpeakerProfile]
    ) -> int | None:
        """Which of the candidates speaks."""
        found = await asyncio.wrap_future(self.engine.identify(np.array(clip), candidates))
        return next((i for i, one in enumerate(candidates) if one is found), None)

    def language_code(self, language: str | None) -> str | None:
        """As the engine's."""
        return self.engine.language_code(language)

    def counts(self) -> Counts:
        """As the engine's."""
        return self.engine.counts

    def _same(self, profile: SpeakerProfile | None) -> SpeakerProfile | None:
        """The object that came first for this profile: a batch holds each but once."""
        if profile is None:
            return None
        kept = self._profiles.setdefault(profile.hash, profile)
        self._profiles.move_to_end(profile.hash)
        while len(self._profiles) > KEPT:
            self._profiles.popitem(last=False)
        return kept


class RayEngine:
    """What the web server asks of `Engine`, answered by replicas; a context manager as well."""

    def __init__(
        self,
        model: str,
        experts: str | None,
        device: str,
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        replicas: int = 1,
        address: str | None = None,
    ) -> None:
        """Start replicas, here or in a cluster, and wait until they are ready.

        Args:
            model, experts, device: as for `Recogniser.load`; each replica loads them.
            max_batch, max_queue: of each replica.
            replicas: how many.
            address: of a Ray cluster that this machine has joined, whose nodes have the model;
                None starts Ray on this machine, for it alone.

        Raises:
            SAMLError: the replicas do not start.
            MissingExtra: ray[serve] is not installed.
        """
        with needs("--engine ray", "ray"):
            import ray
            from ray import serve
        self._ray, self._serve = ray, serve
        self.counts, self.max_queue = Counts(), max_queue * replicas
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        here: dict[str, Any] = {
            "address": "local",  # not the cluster of $RAY_ADDRESS, nor one that runs here already
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "object_store_memory": OBJECTS,
        }
        try:
            ray.init(**(here if address is None else {"address": address}), log_to_driver=False)
            serve.start(proxy_location="Disabled")
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            raise SAMLError(f"--engine ray: Ray does not start: {one_line(error)}") from error
        cores = max(1, (os.cpu_count() or 1) // (2 * replicas)) if address is None else 1
        options: dict[str, Any] = {"num_cpus": cores}
        if device.startswith("cuda"):
            options["num_gpus"] = 1
        deployment = serve.deployment(
            Replica,
            name=NAME,
            num_replicas=replicas,
            max_ongoing_requests=max_queue,
            ray_actor_options=options,
            health_check_timeout_s=_STARTED,
        )
        application = deployment.bind(model, experts, device, max_batch, max_queue)
        try:
            self._handle: Any = serve.run(application, name=NAME, route_prefix=None)
        except RuntimeError as error:
            self._end()
            text = f"--engine ray: the replicas do not start: {one_line(error)}"
            raise SAMLError(text) from error
        self._codes: dict[str | None, str | None] = {}
        self._objects: OrderedDict[str, Any] = OrderedDict()
        self._jobs: dict[Job, asyncio.Task[None] | None] = {}
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="saml-ray", daemon=True)

    def __enter__(self) -> RayEngine:
        """Begin to follow what replicas answer."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the replicas; what is not done is cancelled."""
        left = list(self._jobs)
        for job in left:
            self.cancel(job)
        wait([job.future for job in left], timeout=_LEFT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._end()

    @property
    def waiting(self) -> int:
        """Recordings taken and not done."""
        return len(self._jobs)

    @property
    def is_alive(self) -> bool:
        """Whether answers are followed."""
        return self._thread.is_alive()

    def language_code(self, language: str | None, task: str = "transcribe") -> str | None:
        """As `Engine.language_code`; a language is asked once."""
        if language not in self._codes:
            try:
                self._codes[language] = self._handle.language_code.remote(language).result()
            except Exception as error:
                raise _own(error) from error
        return self._codes[language]

    def check_room(self) -> None:
        """As `Engine.check_room`."""
        if not self.is_alive:
            raise EngineClosed
        if len(self._jobs) >= self.max_queue:
            raise QueueFull(len(self._jobs), WAIT)

    def submit(
        self,
        clip: npt.NDArray[np.float32],
        profile: SpeakerProfile | None = None,
        options: DecodingOptions | None = None,
        on_text: Callable[[str], None] = ignored,
        on_progress: Callable[[float, float], None] = ignored,
    ) -> Job:
        """As `Engine.submit`; `on_progress` is not called."""
        job = Job(clip, profile, options or DecodingOptions(), on_text, on_progress)
        with self._lock:
            self.check_room()
            self._jobs[job] = None
        asyncio.run_coroutine_threadsafe(self._follow(job), self._loop)
        return job

    def cancel(self, job: Job) -> None:
        """As `Engine.cancel`."""
        job.cancelled = True
        with self._lock:
            if job not in self._jobs:
                return
            task = self._jobs.pop(job)
            self.counts.cancelled += 1
        if task is not None:
            self._loop.call_soon_threadsafe(task.cancel)

    def identify(
        self, clip: npt.NDArray[np.float32], candidates: Sequence[SpeakerProfile]
    ) -> Future[SpeakerProfile | None]:
        """As `Engine.identify`."""

        async def ask() -> SpeakerProfile | None:
            found = await self._handle.identify.remote(clip, list(candidates))
            return None if found is None else candidates[found]

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)

    async def _follow(self, job: Job) -> None:
        with self._lock:
            if job.cancelled:
                job.future.set_exception(CancelledError())
                return
            self._jobs[job] = asyncio.current_task()
        clip, job.clip = job.clip, None
        answers: Any = None
        try:
            ask = self._handle.options(stream=True).transcribe.remote
            answers = ask(clip, self._object(job.profile), job.options)
            async for answer in answers:
                if isinstance(answer, str):
                    job.on_text(answer)
                    continue
                self._leave(job)
                self.counts.recordings += 1
                self.counts.audio += answer.duration
                job.future.set_result(answer)
        except asyncio.CancelledError:
            if answers is not None:
                answers.cancel()
            job.future.set_exception(CancelledError())
        except Exception as error:
            self._leave(job)
            self.counts.failed += 1
            job.future.set_exception(_own(error))

    def _leave(self, job: Job) -> None:
        """Its place is free."""
        with self._lock:
            self._jobs.pop(job, None)

    def _object(self, profile: SpeakerProfile | None) -> Any:
        """A profile in Ray's shared memory, put there once."""
        if profile is None:
            return None
        name = profile.hash
        if name not in self._objects:
            self._objects[name] = self._ray.put(profile)
        self._objects.move_to_end(name)
        while len(self._objects) > KEPT:
            self._objects.popitem(last=False)
        return self._objects[name]

    def _end(self) -> None:
        with suppress(Exception):  # whatever state it is in
            self._serve.shutdown()
        self._ray.shutdown()


def _own(error: Exception) -> Exception:
    """The error that a replica raised, out of Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, SAMLError) else error
