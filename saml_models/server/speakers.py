"""`/v1/speakers`: voices recorded, learnt, taken out and in, and deleted."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Body, File, Form, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from saml_kernels.errors import SAMLError
from saml_models.server.learning import Learning
from saml_models.server.requests import Server, found_or_404
from saml_models.server.voices import Voice, is_running, read_profile

__all__ = ["speaker_routes"]

LONGEST_CLIP = 31.0  # seconds


def speaker_routes(server: Server, learning: Learning) -> APIRouter:
    """The routes."""
    routes, limits = APIRouter(prefix="/v1/speakers"), server.settings.limits

    def voice_of(request: Request, name: str, at_rest: bool = False) -> Voice:
        with found_or_404(name):
            voice = server.voices_of(request).find(name)
            if at_rest and is_running(voice.status):
                raise HTTPException(409, f"speaker {name!r}: is being learnt; wait until it is")
            return voice
        raise AssertionError

    def room_for(request: Request, name: str) -> Voice:
        voices = server.voices_of(request)
        voice = Voice(voices.store, name)
        if voice.exists:
            raise HTTPException(409, f"speaker {name!r}: is there already; delete it first")
        if len(voices.names()) >= limits.voices:
            raise HTTPException(400, f"speakers: the limit of voices is {limits.voices}")
        return voice

    def clip_of(request: Request, name: str, id: str, at_rest: bool = False) -> Voice:
        voice = voice_of(request, name, at_rest)
        if id not in voice.notes["clips"]:
            raise HTTPException(404, f"clip {id!r}: there is no such clip")
        return voice

    @routes.get("")
    def listed(request: Request) -> dict[str, Any]:
        """All voices of the caller."""
        voices = server.voices_of(request)
        found = []
        for name in voices.names():
            with suppress(KeyError, SAMLError):  # deleted or damaged meanwhile
                found.append(voices.find(name).describe(server.profiles))
        return {"object": "list", "data": found}

    @routes.post("", status_code=201)
    async def create(
        request: Request,
        name: Annotated[str, Body()],
        identify: Annotated[bool, Body()] = False,
    ) -> dict[str, Any]:
        """A new voice; `identify` says that it may be recognised by itself (speaker=auto)."""
        voice = room_for(request, name)
        voice.create(identify)
        return voice.describe(server.profiles)

    @routes.get("/{name}")
    def shown(request: Request, name: str) -> dict[str, Any]:
        """One voice, its clips and how far learning is."""
        return voice_of(request, name).describe(server.profiles)

    @routes.delete("/{name}", status_code=204)
    async def deleted(request: Request, name: str) -> Response:
        """Everything of a person: profile, recordings, texts, checkpoints."""
        voice = voice_of(request, name)
        voice.delete()
        await learning.cancel(voice)
        voice.delete()  # what the learner wrote until it ended
        await anyio.to_thread.run_sync(server.profiles.forget, voice.path)
        return Response(status_code=204)

    async def stored(
        request: Request, name: str, file: UploadFile, text: str, id: str | None
    ) -> dict[str, Any]:
        voice_of(request, name, at_rest=True)
        async with server.decoded(file.file, LONGEST_CLIP) as upload:
            voice = voice_of(request, name, at_rest=True)  # it may be gone, or being learnt
            number = voice.add(upload.clip, text, id, limits.clips)
            return {"id": number, **voice.notes["clips"][number]}

    @routes.post("/{name}/clips", status_code=201)
    async def recorded(
        request: Request,
        name: str,
        file: Annotated[UploadFile, File()],
        text: Annotated[str, Form()],
    ) -> dict[str, Any]:
        """One clip of up to 30 s, with what is said in it."""
        return await stored(request, name, file, text, None)

    @routes.put("/{name}/clips/{id}")
    async def recorded_again(
        request: Request,
        name: str,
        id: str,
        file: Annotated[UploadFile, File()],
        text: Annotated[str, Form()],
    ) -> dict[str, Any]:
        """The clip once more, in its place."""
        return await stored(request, name, file, text, id)

    @routes.get("/{name}/clips/{id}")
    def played(request: Request, name: str, id: str) -> Response:
        """A clip as FLAC."""
        return FileResponse(clip_of(request, name, id).clip(id), media_type="audio/flac")

    @routes.delete("/{name}/clips/{id}", status_code=204)
    async def taken_back(request: Request, name: str, id: str) -> Response:
        """Delete a clip."""
        clip_of(request, name, id, at_rest=True).remove_clip(id)
        return Response(status_code=204)

    @routes.post("/{name}/learn", status_code=202)
    async def learn(request: Request, name: str) -> Response:
        """Learn the voice from its clips; see its events."""
        voice = voice_of(request, name, at_rest=True)
        learning.begin(voice)
        return JSONResponse(voice.status, 202)

    @routes.get("/{name}/events")
    def events(request: Request, name: str) -> Response:
        """How far learning is, as server-sent events, until it ends."""
        voice = voice_of(request, name)
        return StreamingResponse(learning.events(voice), media_type="text/event-stream")

    @routes.get("/{name}/profile")
    def exported(request: Request, name: str) -> Response:
        """The profile's file, which `saml transcribe --speaker` takes too."""
        voice = voice_of(request, name)
        if not voice.path.is_file():
            raise HTTPException(404, f"speaker {name!r}: has not been learnt yet")
        return FileResponse(
            voice.path, media_type="application/octet-stream", filename=voice.path.name
        )

    @routes.put("/{name}/profile", status_code=201)
    async def imported(
        request: Request,
        name: str,
        file: Annotated[UploadFile, File()],
        identify: Annotated[bool, Form()] = False,
    ) -> dict[str, Any]:
        """A profile from elsewhere as a new voice."""
        room_for(request, name)
        profile = await anyio.to_thread.run_sync(read_profile, file.file)
        voice = room_for(request, name)  # it may have been made meanwhile
        voice.enrol(profile, identify)
        return await anyio.to_thread.run_sync(voice.describe, server.profiles)

    return routes
