"""Work done in a thread while its caller is busy with what came before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`make` of each item, in order, each made before it is asked for.

    What `make` raises is raised where its result would have come.
    """
    with ThreadPoolExecutor(1) as pool:
        pending: Future[Result] | None = None
        try:
            for item in items:
                before, pending = pending, pool.submit(make, item)
                if before is not None:
                    yield before.result()
            if pending is not None:
                yield pending.result()
        finally:
            if pending is not None:
                pending.cancel()
