"""`/v1/audio/transcriptions` and `/v1/models`, as OpenAI's clients ask them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, File, Form, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from saml_kernels.errors import SAMLError
from saml_models.models.interface import DecodingOptions
from saml_models.server.answers import FORMATS, MEDIA_TYPES, answer, delta, done, failed
from saml_models.server.engine import Job
from saml_models.server.requests import Gone, Server, found_or_404, waited_for
from saml_models.speakers.profile import SpeakerProfile
from saml_models.speakers.store import AUTO

__all__ = ["transcription_routes"]

ALIASES = ("whisper-1",)  # what clients ask for that know no other name
LONGEST_PROMPT = 2000  # characters; the decoder sees 223 tokens of them
_CLOSED = 499  # nginx's code for a client that has left; nobody reads it


def transcription_routes(server: Server) -> APIRouter:
    """The routes."""
    routes, settings, engine = APIRouter(), server.settings, server.engine

    def listed(request: Request) -> list[dict[str, Any]]:
        voices = server.voices_of(request).store.names()
        names = [settings.model, *(f"{settings.model}@{voice}" for voice in voices)]
        return [{"id": name, "object": "model", "created": 0, "owned_by": "saml"} for name in names]

    @routes.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        """The model, and `model@speaker` for each voice that the caller may use."""
        return {"object": "list", "data": listed(request)}

    @routes.get("/v1/models/{name:path}")
    def model(name: str, request: Request) -> dict[str, Any]:
        """One of them."""
        for found in listed(request):
            if found["id"] == name:
                return found
        raise HTTPException(404, f"model {name!r}: there is no such model; see /v1/models")

    def speaker_of(asked: str, speaker: str | None) -> str | None:
        """Whom a request names, by its model or its speaker."""
        base, at, named = asked.partition("@")
        if base not in (settings.model, *ALIASES):
            raise HTTPException(404, f"model {asked!r}: there is no such model; see /v1/models")
        if at and speaker not in (None, "", named):
            raise HTTPException(400, f"speaker {speaker!r}: the model names {named!r}; give one")
        return (named if at else speaker) or None

    def profiles_of(request: Request, name: str) -> list[SpeakerProfile]:
        """The profile of a name; for auto, of all who may be recognised."""
        voices = server.voices_of(request)
        if name != AUTO:
            with found_or_404(name):
                return [voices.profile(name)]
        candidates = voices.candidates()
        if not candidates:
            raise HTTPException(400, "speaker auto: none of your voices agreed to be recognised")
        return candidates

    @routes.post("/v1/audio/transcriptions")
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File()],
        model: Annotated[str, Form()],
        language: Annotated[str | None, Form()] = None,
        prompt: Annotated[str, Form()] = "",
        temperature: Annotated[float, Form()] = 0.0,
        response_format: Annotated[str, Form()] = "json",
        granularities: Annotated[list[str] | None, Form(alias="timestamp_granularities[]")] = None,
        stream: Annotated[bool, Form()] = False,
        speaker: Annotated[str | None, Form()] = None,
    ) -> Response:
        """Text of a recording, with or without times."""
        asked = granularities or ["segment"]
        _check(response_format, asked, prompt, temperature)
        name = speaker_of(model, speaker)
        engine.check_room()
        words = "word" in asked and response_format == "verbose_json"
        options = DecodingOptions(
            language=engine.language_code(language or None),
            timestamps=response_format in ("srt", "vtt", "verbose_json"),
            words=words,
            prompt=prompt,
            temperature=temperature,
        )
        profiles: list[SpeakerProfile] = []
        if name is not None:
            profiles = await anyio.to_thread.run_sync(profiles_of, request, name)
        async with AsyncExitStack() as stack:
            upload = await stack.enter_async_context(server.decoded(file.file))
            profile = profiles[0] if profiles else None
            if name == AUTO:
                profile = await asyncio.wrap_future(engine.identify(upload.clip, profiles))
            texts: asyncio.Queue[str] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def on_text(text: str) -> None:
                loop.call_soon_threadsafe(texts.put_nowait, text)

            job = engine.submit(upload.clip, profile, options, on_text)
            stack.callback(engine.cancel, job)  # where it is not done by then
            if stream and response_format in ("json", "text"):
                return _Stream(_events(job, texts), stack.pop_all())
            try:
                found = await waited_for(request, job)
            except Gone:
                return Response(status_code=_CLOSED)
            body = answer(found, response_format, words, "segment" in asked)
            if isinstance(body, str):
                return Response(body, media_type=f"{MEDIA_TYPES[response_format]}; charset=utf-8")
            return JSONResponse(body)

    return routes


class _Stream(StreamingResponse):
    """Server-sent events; what they hold is let go whatever becomes of the client."""

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.held:
            await super().__call__(scope, receive, send)


async def _events(job: Job, texts: asyncio.Queue[str]) -> AsyncIterator[str]:
    """Deltas as they are heard, and the whole text; together they are the same."""
    said = ""
    future = asyncio.wrap_future(job.future)
    newest: asyncio.Future[str] | None = None
    try:
        while not (future.done() and texts.empty()):
            newest = asyncio.ensure_future(texts.get())
            first: set[asyncio.Future[Any]] = {future, newest}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not newest.done():
                newest.cancel()
                continue
            text = newest.result()
            if text != said:
                yield delta(text[len(said) :])
                said = text
        try:
            yield done(future.result())
        except SAMLError as error:  # the answer has begun: its status cannot be changed
            yield failed(error)
    finally:
        future.cancel()
        if newest is not None:
            newest.cancel()


def _check(format: str, granularities: Sequence[str], prompt: str, temperature: float) -> None:
    wrong = None
    if format not in FORMATS:
        wrong = f"response_format {format!r}: expected one of {', '.join(FORMATS)}"
    elif not set(granularities) <= {"word", "segment"}:
        wrong = f"timestamp_granularities {list(granularities)}: expected word, segment or both"
    elif "word" in granularities and format != "verbose_json":
        wrong = "timestamp_granularities word: needs response_format verbose_json"
    elif len(prompt) > LONGEST_PROMPT:
        wrong = f"prompt: {len(prompt)} characters; expected at most {LONGEST_PROMPT}"
    elif not 0 <= temperature <= 1:
        wrong = f"temperature: {temperature}; expected 0 to 1"
    if wrong is not None:
        raise HTTPException(400, wrong)
