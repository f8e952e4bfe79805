"""Options that name things: some of those known, or NAME:{JSON} for one's own variant."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import TypeVar

from saml_kernels.errors import SAMLError

__all__ = ["named", "some_of"]

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


def some_of(option: str, given: str | None, known: Collection[str]) -> list[str]:
    """The names that an option's value holds, by commas; all that are known where none is given.

    Names may hold commas of their own.

    Raises:
        SAMLError: one of them is not known.
    """
    if not given:
        return list(known)
    parts, names = [part.strip() for part in given.split(",")], []
    while parts:
        for count in range(len(parts), 0, -1):
            if (name := ", ".join(parts[:count])) in known:
                break
        else:
            raise SAMLError(f"{option} {parts[0]}: expected some of {', '.join(known)}")
        names.append(name)
        del parts[:count]
    return names
