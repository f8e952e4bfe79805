"""The tickets and counters of the one-launch kernels: every interleaving of a few programs.

A model of `kernels/tickets.py` as `single.py` and `backward.py` use it, one step for each access to
memory that others see. States are explored until no new one is found; nothing is drawn at random.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from saml_kernels.backends.triton import counters as counters_module
from saml_kernels.backends.triton.counters import Counters

PIECES, TILES, SHARES = 2, 2, 2  # of P, of the result, of each tile's reduction
PROGRAMS = PIECES + TILES * SHARES


class Fault(AssertionError):
    """Something that must not happen."""


@dataclass(frozen=True)
class State:
    """What all programs see, and where each of them stands: (step, number of its work)."""

    waiting: int = PROGRAMS  # programs that have not started
    running: tuple[tuple[str, int], ...] = ()
    ticket: int = 0
    finished: int = 0
    arrived: int = 0
    ready: int = 0
    tiles: tuple[int, ...] = (0,) * TILES
    pieces: frozenset = frozenset()  # of P, stored
    shares: frozenset = frozenset()  # of Y, stored
    hidden: bool = False
    stored: tuple[int, ...] = (0,) * TILES  # how often each tile of Y was
    untaken: frozenset = frozenset()  # work that no ticket orders; see "any order"


def step(state: State, program: tuple[str, int], rule: str) -> Iterator[tuple[State, str | None]]:
    """What the program may do next, and its step after that (None: it has ended)."""
    at, work = program
    tile = (work - PIECES) // SHARES
    if at == "start":
        if rule == "any order":  # as CUDA starts programs: by no order at all
            for taken in state.untaken:
                rest = state.untaken - {taken}
                yield replace(state, untaken=rest), f"store {taken}"
            return
        taken = state.ticket if rule != "tiles first" else PROGRAMS - 1 - state.ticket
        yield replace(state, ticket=state.ticket + 1), f"store {taken}"
    elif at == "store" and work < PIECES:
        pieces = state.pieces if rule == "counts before it stores" else state.pieces | {work}
        yield replace(state, pieces=pieces), "arrive"
    elif at == "store":
        yield replace(state, shares=state.shares | {work}), "arrive"
    elif at == "arrive" and work < PIECES:
        last = state.arrived == PIECES - 1
        yield replace(state, arrived=state.arrived + 1), "gather" if last else None
    elif at == "arrive":
        last = state.tiles[tile] == SHARES - 1
        tiles = list(state.tiles)
        tiles[tile] += 1
        yield replace(state, tiles=tuple(tiles)), "add" if last else None
    elif at == "gather":
        if len(state.pieces) < PIECES:
            raise Fault("a share of P is read before it was stored")
        yield replace(state, hidden=True), "raise"
    elif at == "raise":
        yield replace(state, ready=1), None
    elif at == "add":
        if sum((s - PIECES) // SHARES == tile for s in state.shares) < SHARES:
            raise Fault("a share of Y is read before it was stored")
        tiles = list(state.tiles)
        tiles[tile] = 0
        yield replace(state, tiles=tuple(tiles)), "count" if rule == "counts too early" else "wait"
    elif at == "wait" and (state.ready or rule == "does not wait"):
        if not state.hidden:
            raise Fault("H is read before it was stored")
        stored = list(state.stored)
        stored[tile] += 1
        after = None if rule == "counts too early" else "count"
        yield replace(state, stored=tuple(stored)), after
    elif at == "count":
        last = state.finished == TILES - 1
        after = "wait" if rule == "counts too early" else None
        yield replace(state, finished=state.finished + 1), "clear" if last else after
    elif at == "clear":
        after = "wait" if rule == "counts too early" else None
        yield replace(state, ticket=0, finished=0, arrived=0, ready=0), after


def explore(residents: int, rule: str = "") -> int:
    """Follow every interleaving with so many programs under way; gives the number of states.

    Raises:
        Fault: some order ends in a deadlock, a wrong read, a wrong result or counters not zero.
    """
    first = State(untaken=frozenset(range(PROGRAMS)) if rule == "any order" else frozenset())
    seen, front = {first}, [first]
    while front:
        state = front.pop()
        found = []
        if state.waiting and len(state.running) < residents:
            started = tuple(sorted((*state.running, ("start", -1))))
            found.append(replace(state, waiting=state.waiting - 1, running=started))
        for program in set(state.running):
            others = list(state.running)
            others.remove(program)
            for then, after in step(state, program, rule):
                running = others
                if after is not None:
                    name, _, number = after.partition(" ")
                    running = [*others, (name, int(number) if number else program[1])]
                found.append(replace(then, running=tuple(sorted(running))))
        if not found:
            check_end(state)
        fresh = set(found) - seen
        seen |= fresh
        front += fresh
    return len(seen)


def check_end(state: State) -> None:
    if state.waiting or state.running:
        raise Fault(f"deadlock: {state.running}, {state.waiting} not started")
    if any((state.ticket, state.finished, state.arrived, state.ready, *state.tiles)):
        raise Fault(f"counters are left: {state}")
    if set(state.stored) != {1}:
        raise Fault(f"tiles were stored {state.stored} times")


@pytest.mark.parametrize("residents", [1, 2, 3, PROGRAMS])
def test_no_order_goes_wrong(residents):
    assert explore(residents) > 20


@pytest.mark.parametrize(
    ("rule", "residents", "message"),
    [
        ("any order", 1, "deadlock"), ("any order", 2, "deadlock"), ("tiles first", 2, "deadlock"),
        ("counts before it stores", 2, "share of P"), ("does not wait", PROGRAMS, "H is read|left"),
        ("counts too early", PROGRAMS, "deadlock|left"),
    ],
)  # fmt: skip
def test_other_protocols_do(rule, residents, message):
    """The check itself finds what each part of the protocol is for."""
    with pytest.raises(Fault, match=message):
        explore(residents, rule)


# Whose counters they are.


class Device:
    """Streams and captures of a device, played on the CPU."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(counters_module, "BLOCK", 1024)
        self.stream, self.captured = 1, False
        cpu = torch.device("cpu")
        self.counters = Counters(cpu, lambda index: self.stream, lambda: self.captured)
        self.kept = []  # by the graph that is captured
        monkeypatch.setattr(counters_module, "keep", self.keep)

    def keep(self, tensor):
        if self.kept is not None:
            self.kept.append(tensor)
        return self.kept is not None

    def __call__(self, count=10):
        return self.counters.take(count)


def apart(*tensors):
    """Whether no two of them overlap."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    return all(a[1] <= b[0] for a, b in pairwise(spans))


@pytest.fixture
def gpu(monkeypatch):
    return Device(monkeypatch)


def test_calls_of_a_stream_share_theirs_and_streams_do_not(gpu):
    one = gpu()
    gpu.stream = 2
    other = gpu()
    gpu.stream = 1
    assert gpu() is one and apart(one, other)
    assert one.dtype == torch.int32 and not one.any() and not other.any()
    assert gpu(10_000).numel() >= 10_000


def test_captured_calls_share_with_nobody(gpu):
    eager = gpu()
    gpu.captured = True
    taken = [gpu(count) for count in (10, 70, 10, 64)]
    gpu.stream = 2
    taken.append(gpu())
    assert apart(eager, *taken) and all(t.data_ptr() % 16 == 0 for t in taken)
    assert [t.numel() for t in taken] == [10, 70, 10, 64, 10]
    for t in taken:
        t.fill_(7)  # in the middle of a replay
    gpu.captured, gpu.stream = False, 1
    assert gpu() is eager and not gpu().any()


def test_counters_live_as_long_as_their_graph(gpu):
    gpu()
    gpu.captured = True
    storage = weakref.ref(gpu(600).untyped_storage())
    gpu.captured = False
    gpu()  # another block
    gpu.captured = True
    kept, gpu.kept = gpu.kept, []
    gpu(600)
    gc.collect()
    assert storage() is not None
    del kept
    gc.collect()
    assert storage() is None
    gpu.kept = None  # captured by somebody whose graph keeps nothing: zeroed by the capture
    one, other = gpu(), gpu()
    assert apart(one, other, gpu.counters.block)


def test_a_block_is_made_outside_of_captures(gpu):
    gpu()
    gpu.captured = True
    first = [gpu(100) for _ in range(8)]  # all of the block
    alone = gpu(100)  # zeroed by the capture itself
    gpu.captured = False
    gpu()
    gpu.captured = True
    assert apart(*first, alone, *(gpu(100) for _ in range(8))) and not alone.any()
