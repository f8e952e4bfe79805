"""Programs of an interpreted kernel side by side: they change over at every atomic operation.

Triton's interpreter runs one program after the other. Here each is a thread, one of which runs at a
time; which goes on after an atomic, and which starts when another ends, is drawn at random. No more
than `residents` are under way, as on a device that has no room for all.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from triton.runtime import interpreter

PATIENCE = 400  # changes of program without one that ends: nobody gets on


class Stuck(AssertionError):
    """Programs wait for what cannot come."""


class _Program(threading.Thread):
    def __init__(self, body: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.body, self.turn, self.paused = body, threading.Semaphore(0), threading.Semaphore(0)
        self.ended, self.error, self.abandoned = False, None, False

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.abandoned:
                self.body()
        except BaseException as error:
            self.error = error
        self.ended = True
        self.paused.release()

    def pause(self) -> None:
        self.paused.release()
        self.turn.acquire()
        if self.abandoned:
            raise Stuck

    def go_on(self) -> None:
        self.turn.release()
        self.paused.acquire()


def _run(programs: list[Callable[[], Any]], draw: random.Random, residents: int) -> None:
    waiting = [_Program(p) for p in programs]
    draw.shuffle(waiting)
    running: list[_Program] = []
    patience = PATIENCE
    while waiting or running:
        while waiting and len(running) < residents:
            running.append(waiting.pop())
            running[-1].start()
        program = draw.choice(running)
        program.go_on()
        patience -= 1
        if program.ended:
            running.remove(program)
            patience = PATIENCE
        if program.error is not None or not patience:
            for other in running:
                other.abandoned = True
                other.turn.release()
            raise program.error or Stuck(f"{len(waiting)} programs never started")


@contextmanager
def interleaved(seed: int, residents: int, *, backwards: bool = False) -> Iterator[list[int]]:
    """Within the block kernels run so; gives the number of programs of each launch.

    With `backwards` tickets (relaxed atomics) come from the last to the first.
    """
    draw, launches = random.Random(seed), []
    executor, builder = interpreter.GridExecutor, interpreter.interpreter_builder
    call, rmw, dim = executor.__call__, builder.create_atomic_rmw, builder.set_grid_dim

    def run(self: Any, *arguments: Any, **named: Any) -> None:
        body, programs = self.fn, []

        def collect(**given: Any) -> None:
            programs.append(partial(body, **given))
            if len(programs) == launches[-1]:
                builder.grid_idx = None  # nothing may ask which program it is
                _run(programs, draw, residents)

        def begin(*sizes: int) -> None:
            dim(*sizes)
            launches.append(sizes[0] * sizes[1] * sizes[2])
            self.fn = collect

        builder.set_grid_dim = begin
        try:
            call(self, *arguments, **named)
        finally:
            self.fn, builder.set_grid_dim = body, dim

    def atomic(*arguments: Any) -> Any:
        current = threading.current_thread()
        if isinstance(current, _Program):
            current.pause()
        result = rmw(*arguments)
        if backwards and "RELAXED" in str(arguments[4]):
            result.data = launches[-1] - 1 - result.data
        return result

    executor.__call__, builder.create_atomic_rmw = run, atomic
    try:
        yield launches
    finally:
        executor.__call__ = call
        del builder.create_atomic_rmw, builder.set_grid_dim
