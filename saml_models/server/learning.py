"""Voices that are being learnt: one process at a time, started again where it was killed."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from saml_kernels.errors import SAMLError, one_line
from saml_models.server.settings import Settings
from saml_models.server.voices import Voice, is_running
from saml_models.speakers.store import ProfileStore
from saml_models.training.checkpoint import forget

__all__ = ["Learning"]

TRIES = 4  # of a learner that dies
POLL = 0.2  # seconds between two looks at how far it is
_log = logging.getLogger(__name__)


class Learning:
    """The queue of voices to learn, of all owners."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._queue: asyncio.Queue[Voice] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self._current: tuple[Path, asyncio.subprocess.Process] | None = None

    async def start(self) -> None:
        """Begin, with the voices that were being learnt when the server ended."""
        store = self.settings.store
        for folder in (store, *sorted(store.glob("owners/*"))):
            for path in sorted(folder.glob("enrolment/*/status.json")):
                with suppress(SAMLError):
                    voice = Voice(ProfileStore(folder), path.parent.name)
                    if is_running(voice.status):
                        self._queue.put_nowait(voice)
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End; what is being learnt goes on when the server comes again."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])  # however it ends
        await self._kill()

    def begin(self, voice: Voice) -> None:
        """Learn a voice when its turn comes.

        Raises:
            SAMLError: it has no clips, or is being learnt.
        """
        if is_running(voice.status):
            raise SAMLError(f"{voice.name}: is being learnt already")
        if not voice.notes["clips"]:
            raise SAMLError(f"{voice.name}: has no clips; record some first")
        forget(voice.folder / "checkpoint")
        voice.status = {"state": "queued"}
        self._queue.put_nowait(voice)

    async def cancel(self, voice: Voice) -> None:
        """Stop learning a voice that is about to be deleted."""
        if self._current is not None and self._current[0] == voice.folder:
            await self._kill()

    async def events(self, voice: Voice) -> AsyncIterator[str]:
        """How far it is, as server-sent events, until it is learnt or has failed."""
        last = ""
        while voice.exists:
            status = voice.status
            text = json.dumps(status)
            if text != last:
                yield f"data: {text}\n\n"
                last = text
            if not is_running(status):
                return
            await asyncio.sleep(POLL)

    async def _work(self) -> None:
        while True:
            voice = await self._queue.get()
            try:
                await self._learn(voice)
            except Exception as error:  # of this voice alone: those behind it have their turn
                _log.exception("speaker %r: cannot be learnt", voice.name)
                with suppress(Exception):  # what cannot be written stays as it is
                    voice.status = {"state": "failed", "error": one_line(error)}

    async def _learn(self, voice: Voice) -> None:
        for _ in range(TRIES):
            if not voice.exists or not is_running(voice.status):
                return
            voice.status = {**voice.status, "state": "learning"}
            if await self._learnt(voice) == 0:
                return
        voice.status = {
            "state": "failed",
            "error": f"the process that learns it has ended {TRIES} times",
        }

    async def _learnt(self, voice: Voice) -> int:
        settings = self.settings
        options: list[str] = ["--model", settings.load, "--device", settings.device]
        if settings.experts is not None:
            options += ["--experts", settings.experts]
        if settings.epochs is not None:
            options += ["--epochs", str(settings.epochs)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "saml_models.server.learner",
            str(voice.path.parent), voice.name, *options,
        )  # fmt: skip
        self._current = voice.folder, process
        try:
            return await process.wait()
        finally:
            await self._kill()

    async def _kill(self) -> None:
        if self._current is None:
            return
        (_, process), self._current = self._current, None
        with suppress(ProcessLookupError):
            process.kill()
        await asyncio.shield(process.wait())
