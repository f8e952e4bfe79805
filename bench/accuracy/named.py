"""Options of the form NAME:{JSON}: one's own variant of something, and what differs in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from saml_kernels.errors import SAMLError

__all__ = ["named"]

_Made = TypeVar("_Made")


def named(option: str, given: str, make: Callable[..., _Made], what: str) -> tuple[str, _Made]:
    """The name, and what `make` makes of the JSON object's fields.

    Args:
        option: of the command line, for the error.
        given: its value.
        make: called with the fields by name; TypeError or ValueError where they are wrong.
        what: the fields are, for the error.

    Raises:
        SAMLError: the value has another form, or other fields.
    """
    name, _, fields = given.partition(":")
    try:
        return name, make(**json.loads(fields))
    except (TypeError, ValueError) as error:
        raise SAMLError(f"{option} {given}: expected NAME:{{JSON}}{what}") from error
