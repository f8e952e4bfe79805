"""Who may come in, and with how much: decided before a request's body is read."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from saml_models.server.errors import error_body
from saml_models.server.settings import Settings, is_loopback

__all__ = ["Guard"]

OPEN, PAGE = ("/healthz", "/"), "/page/"  # what needs no token


class Guard:
    """ASGI middleware: tokens, other sites' pages, and the size of bodies."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        limit = self.settings.limits.bytes
        message = f"the request is larger than the limit of {limit:,} bytes; send less at a time"
        too_large = JSONResponse(error_body(message, "invalid_request_error", "too_large"), 413)
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > limit:
            await _drain(receive, limit if length.isdigit() and int(length) <= 2 * limit else 0)
            await too_large(scope, receive, send)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            part = await receive()
            read += len(part.get("body", b""))
            if read > limit:
                await _drain(receive, limit)
                raise HTTPException(413, message)
            return part

        await self.app(scope, bounded, send)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        settings, path = self.settings, scope["path"]
        origin, host = headers.get("origin"), headers.get("host", "")
        try:
            site, name = urlsplit(origin or "").netloc, urlsplit(f"//{host}").hostname or ""
        except ValueError:
            text = f"host {host!r}, origin {origin!r}: one is no address; send those of this server"
            return JSONResponse(error_body(text, "permission_error", "host"), 403)
        own = origin is None or site == host
        if not own and origin not in settings.origins:
            text = "pages of other sites may not call this server; see --origin"
            return JSONResponse(error_body(text, "permission_error", "origin"), 403)
        if not settings.tokens and not is_loopback(name):
            # Without tokens the address is all there is: a name that was pointed here is not it.
            text = f"host {host!r}: without tokens this server answers on localhost only"
            return JSONResponse(error_body(text, "permission_error", "host"), 403)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        owner = settings.owner_of(token.strip() if scheme.lower() == "bearer" else None)
        is_open = path in OPEN or path.startswith(PAGE) or scope["method"] == "OPTIONS"
        if owner is None and not is_open:
            text = "no valid token; send one in the header Authorization: Bearer TOKEN"
            return JSONResponse(
                error_body(text, "authentication_error", "invalid_api_key"),
                401,
                {"WWW-Authenticate": "Bearer"},
            )
        scope.setdefault("state", {})["owner"] = owner
        return None


async def _drain(receive: Receive, most: int) -> None:
    """Read on and forget: many clients read an answer only when they have sent everything."""
    while most > 0:
        part = await receive()
        most -= len(part.get("body", b""))
        if part["type"] != "http.request" or not part.get("more_body"):
            return
