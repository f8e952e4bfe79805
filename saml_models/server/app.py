"""The web application: routes, errors, metrics and the page around one engine."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from saml_kernels.errors import SAMLError, one_line
from saml_models.server.engine import Engine
from saml_models.server.errors import error_body, kind_of, refusal
from saml_models.server.guard import Guard
from saml_models.server.learning import Learning
from saml_models.server.metrics import Metrics
from saml_models.server.requests import Server
from saml_models.server.settings import Settings
from saml_models.server.speakers import speaker_routes
from saml_models.server.transcriptions import transcription_routes

__all__ = ["create_app"]

PAGE = Path(__file__).parent / "page"
# Nothing from elsewhere: no scripts, no styles, no frames.
POLICY = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; "
    "connect-src 'self'; media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_log = logging.getLogger(__name__)


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """An ASGI application.

    Args:
        engine: running, or started before the first request.
        settings: limits, tokens and names.
    """
    server, learning = Server(engine, settings), Learning(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await learning.start()
        yield
        await learning.stop()

    app = FastAPI(title="saml", docs_url=None, redoc_url=None, lifespan=lifespan)
    metrics = Metrics(engine)
    app.include_router(transcription_routes(server))
    app.include_router(speaker_routes(server, learning))

    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY})

    @app.get("/healthz")
    def healthz() -> Response:
        alive = engine.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    def scrape() -> Response:
        return Response(metrics.text(), media_type=metrics.media_type)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        status, text = error.status_code, str(error.detail)
        if isinstance(error.__cause__, OSError):  # to FastAPI a full disk is a malformed body
            status, text = 500, f"upload: cannot be kept: {error.__cause__.strerror}"
        if status == 500:
            _log.error("%s: %s", request.url.path, text)
        return JSONResponse(error_body(text, kind_of(status)), status, error.headers or None)

    @app.exception_handler(SAMLError)
    async def failed(request: Request, error: SAMLError) -> Response:
        return await refused(request, refusal(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(
            error_body(f"{name}: {one_line(ValueError(first['msg']))}", "invalid_request_error"),
            400,
        )

    guarded: Any = app.add_middleware
    guarded(Guard, settings=settings)
    if settings.origins:
        guarded(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    guarded(metrics.middleware)
    return app
