"""What goes wrong, as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException

from saml_kernels.errors import SAMLError
from saml_models.server.engine import EngineClosed, QueueFull
from saml_models.server.uploads import MemoryFull
from saml_models.server.voices import StoreError

__all__ = ["error_body", "kind_of", "refusal"]

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def kind_of(status: int) -> str:
    """The type of an error that is answered with a status."""
    return KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")


def refusal(error: SAMLError) -> HTTPException:
    """How an error is answered: clients ask again after 429, 500 and 503, but not after 400."""
    text = str(error)
    if isinstance(error, QueueFull):
        return HTTPException(429, text, {"Retry-After": f"{error.retry_after:.0f}"})
    if isinstance(error, MemoryFull):
        return HTTPException(429, text, {"Retry-After": "10"})
    if isinstance(error, EngineClosed):
        return HTTPException(503, text)
    return HTTPException(500 if isinstance(error, StoreError) else 400, text)
