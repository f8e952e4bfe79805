"""What the routes share: errors, the caller's voices, uploads, and waiting for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, BinaryIO

import anyio
import numpy as np
import numpy.typing as npt
from starlette.exceptions import HTTPException
from starlette.requests import Request

from saml_kernels.errors import SAMLError
from saml_models.server.engine import Engine, Job
from saml_models.server.settings import Settings
from saml_models.server.uploads import Memory, MemoryFull, decode_upload
from saml_models.server.voices import Profiles, Voices
from saml_models.text.transcript import Transcript

__all__ = ["Gone", "Server", "Upload", "found_or_404", "waited_for"]


class Gone(Exception):
    """The client has left."""


class Server:
    """What lives as long as the application.

    Attributes:
        engine, settings: as given.
        memory: of decoded recordings.
        decoders: how many are decoded at once.
        profiles: of all owners.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.memory = Memory(settings.limits.memory)
        self.decoders = anyio.CapacityLimiter(settings.limits.decoders)
        self.profiles = Profiles(settings.limits.voices)

    def voices_of(self, request: Request) -> Voices:
        """Those of whose token it is; everybody's where there are no tokens."""
        return Voices(self.settings.folder_of(request.state.owner), self.profiles)

    @asynccontextmanager
    async def decoded(self, file: BinaryIO, seconds: float | None = None) -> AsyncIterator[Upload]:
        """Within the block a recording's samples count among those in memory."""
        upload = Upload(self.memory)
        most = min(seconds or self.settings.limits.seconds, self.settings.limits.seconds)
        try:
            try:
                upload.clip = await anyio.to_thread.run_sync(
                    decode_upload, file, most, upload.take, limiter=self.decoders
                )
            except MemoryFull:
                raise
            except SAMLError as error:
                raise SAMLError(f"file: {error}") from error
            yield upload
        finally:
            upload.clip = upload.clip[:0].copy()
            self.memory.give(upload.held)


class Upload:
    """A decoded recording, empty before it is one, and bytes that it holds."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.held = memory, 0
        self.clip: npt.NDArray[np.float32] = np.zeros(0, np.float32)

    def take(self, size: int) -> None:
        """Hold so many bytes more."""
        self.memory.take(size)
        self.held += size


@contextmanager
def found_or_404(name: str) -> Iterator[None]:
    """A voice that is not there, is another's, or cannot be: all the same answer."""
    try:
        yield
    except KeyError:
        raise HTTPException(404, f"speaker {name!r}: there is no such voice") from None


async def waited_for(request: Request, job: Job) -> Transcript:
    """A job's transcript.

    Raises:
        Gone: it has left.
        SAMLError: what went wrong.
    """
    future = asyncio.wrap_future(job.future)
    left = asyncio.ensure_future(_left(request))
    first: set[asyncio.Future[Any]] = {future, left}
    try:
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise Gone
        return future.result()
    finally:
        left.cancel()
        future.cancel()  # nobody asks any more; the job's own is the engine's


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
