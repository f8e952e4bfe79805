"""Software pipelining, checked without a GPU: no read of a multi-buffer may miss its own copy.

Triton's pipeliner copies the tiles of later iterations into the slots of a buffer in shared memory
while earlier ones are multiplied. Its GPU IR (TTGIR) says which slot each copy and each read takes,
so `check` executes it, with numbers for slots and loops and nothing for tiles, and notes which
copy every slot holds. gpu_ir.py compiles a launch that far.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from gpu_ir import Operation, parse

SLOTS = re.compile(r"-> !ttg\.memdesc<(\d+)x(\d+(?:x\d+)*)x(\w+)")
BARRIER = re.compile(r"-> !ttg\.memdesc<1xi64\b")  # one, and not a slot of several
UNKNOWN: frozenset = frozenset()  # a tile or a number that depends on no copy


@dataclass
class Copy:
    """What lies in a slot: the copy's number within its buffer, and when it has arrived."""

    number: int
    group: int | None = None  # of cp.async, counted from 0; None: not committed
    barrier: tuple[int, int] | None = None  # (barrier's slot, use of it), of a tensor-memory copy
    arrived: bool = False


@dataclass(eq=False)
class Buffer:
    """One allocation in shared memory."""

    name: str
    slots: int  # 0: filled where it is made, never copied into
    depth: int  # of the loops around it
    sources: frozenset = UNKNOWN  # of what it was filled with
    holds: dict[int, Copy] = field(default_factory=dict)
    copies: int = 0
    per_iteration: Counter = field(default_factory=Counter)
    # Where in its loop (None: before or after it), reader, number of the copy found.
    reads: list[tuple[Place | None, Operation, int]] = field(default_factory=list)
    uses: dict[int, int] = field(default_factory=dict)  # of a barrier's slots


Place = tuple[int, int, int]  # loop, which time it runs, iteration


@dataclass(frozen=True)
class View:
    """A slot of a buffer."""

    buffer: Buffer
    slot: int


class Unfollowed(Exception):
    """The IR does something that this check does not understand, which is a fault too."""


@dataclass
class Report:
    """What a kernel's pipelines are.

    Attributes:
        buffers: slots of each buffer that later iterations are copied into.
        faults: one line each; empty where every read finds the copy of its own iteration.
    """

    buffers: dict[str, int]
    faults: list[str]


def check(text: str) -> Report:
    """Execute TTGIR for several trip counts of its loops, and both ways of unknown conditions."""
    body = parse(text)
    buffers: dict[str, int] = {}
    read: set[str] = set()
    faults: dict[str, str] = {}
    most = min(8, max((int(slots) for slots, _, _ in SLOTS.findall(text)), default=1))
    for trips in (*range(most + 3), 3 * most + 3):
        for way in (True, False):
            run = _Run(trips, way)
            try:
                run.block(body)
                run.finish()
            except Unfollowed as error:
                run.faults.append(str(error))
            buffers |= {b.name: b.slots for b in run.buffers if b.copies}
            read |= {b.name for b in run.buffers if b.reads}
            for fault in run.faults:
                faults.setdefault(fault, f"{fault} ({trips} iterations)")
            if not run.chose:
                break
    never = [f"{name} is copied into and never read" for name in buffers if name not in read]
    return Report(buffers, [*faults.values(), *never])


_ARITHMETIC = {
    "addi": lambda a, b: a + b, "subi": lambda a, b: a - b, "muli": lambda a, b: a * b,
    "divsi": lambda a, b: int(a / b), "divui": lambda a, b: a // b,
    "remsi": lambda a, b: a - int(a / b) * b, "remui": lambda a, b: a % b,
    "minsi": min, "maxsi": max, "minui": min, "maxui": max,
    "andi": lambda a, b: a & b, "ori": lambda a, b: a | b, "xori": lambda a, b: a ^ b,
}  # fmt: skip
_COMPARISONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b, "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b, "sge": lambda a, b: a >= b,
    "ult": lambda a, b: a < b, "ule": lambda a, b: a <= b,
    "ugt": lambda a, b: a > b, "uge": lambda a, b: a >= b,
}  # fmt: skip
_SAME = {"memdesc_trans", "memdesc_reshape", "memdesc_subslice", "memdesc_reinterpret"}
_CASTS = {"extsi", "extui", "trunci", "index_cast", "index_castui"}


class _Run:
    """One execution. Values are integers, buffers, views, or the copies that a tile came from."""

    def __init__(self, trips: int, way: bool) -> None:
        self.trips, self.way, self.chose = trips, way, False
        self.values: dict[str, Any] = {}
        self.loops: list[Place] = []
        self.ran: Counter = Counter()
        self.buffers: list[Buffer] = []
        self.faults: list[str] = []
        self.open: list[Copy] = []
        self.groups = 0
        self.done = 0  # groups of cp.async that were waited for
        self.flying: list[list[View]] = []  # asynchronous products, with what they read
        # Those of tensor memory, by the use of a barrier's slot that tells of their end.
        self.announced: dict[tuple[View, int], list[View]] = {}

    def value(self, name: str) -> Any:
        return self.values.get(name, UNKNOWN)

    def block(self, operations: list[Operation]) -> list[Any]:
        """What the block's last operation hands over."""
        for o in operations:
            if o.name in ("scf.yield", "scf.condition"):
                return [self.value(n) for n in o.operands]
            found = self.step(o)
            for name, count in o.results:
                own, found = found[:count], found[count:]
                own += [UNKNOWN] * (count - len(own))
                if count == 1:
                    self.values[name] = own[0]
                self.values |= {f"{name}#{i}": v for i, v in enumerate(own)}
        return []

    def step(self, o: Operation) -> list[Any]:
        dialect, _, name = o.name.partition(".")
        method = getattr(self, f"_{dialect}_{name}", None)
        if method is not None:
            return method(o)
        given = [self.value(n) for n in o.operands]
        if dialect == "arith":
            return [self.arithmetic(name, o, given)]
        if name in _SAME:
            return given[:1]
        if dialect == "cf" or name in ("call", "warp_specialize"):
            raise Unfollowed(f"{o.name} is not followed")
        if any(isinstance(v, Buffer | View) for v in given):
            raise Unfollowed(f"{o.name} of shared memory is not followed")
        return [_sources(given)] * sum(count for _, count in o.results)

    def arithmetic(self, name: str, o: Operation, given: list[Any]) -> Any:
        if name == "constant":
            if (found := re.match(r" (-?\d+|true|false)\b(?!\.)", o.text)) is not None:
                word = found.group(1)
                return int(word == "true") if word.isalpha() else int(word)
            return UNKNOWN
        if name == "select":
            condition, yes, no = given
            if isinstance(condition, int):
                return yes if condition else no
            return yes if yes == no else _sources(given)
        if name in _CASTS and isinstance(given[0], int):
            return given[0]
        if len(given) == 2 and all(isinstance(v, int) for v in given):
            if name == "cmpi":
                return int(_COMPARISONS[o.text.split()[0].rstrip(",")](*given))
            if name in _ARITHMETIC and not (name[:3] in ("div", "rem") and given[1] == 0):
                return _ARITHMETIC[name](*given)
        return _sources(given)

    # Control.

    def _scf_if(self, o: Operation) -> list[Any]:
        condition = self.value(o.operands[0])
        if not isinstance(condition, int):
            self.chose, condition = True, self.way
        chosen = o.regions[:1] if condition else o.regions[1:]
        return self.block(chosen[0]) if chosen else []

    def _scf_for(self, o: Operation) -> list[Any]:
        index, first, last, step, *rest = o.operands
        names, carried = rest[::2], [self.value(n) for n in rest[1::2]]
        by = self.value(step)
        by = by if isinstance(by, int) else 1
        # Unknown bounds become known ones, for what asks for them later too.
        if not isinstance(self.value(first), int):
            self.values[first] = 0
        if not isinstance(self.value(last), int):
            self.values[last] = self.value(first) + self.trips * by
        self.ran[id(o)] += 1
        for iteration, i in enumerate(range(self.value(first), self.value(last), by)):
            self.loops.append((id(o), self.ran[id(o)], iteration))
            self.values |= dict(zip(names, carried, strict=True))
            self.values[index] = i
            carried = self.block(o.regions[0])
            self.loops.pop()
        # Sums over iterations come from none of them.
        return [UNKNOWN if isinstance(v, frozenset) else v for v in carried]

    def _scf_while(self, o: Operation) -> list[Any]:
        given = o.operands[1::2]
        names, carried = o.operands[::2], [self.value(n) for n in given]
        before, after = o.regions
        for turn in range(min(self.trips, 2) + 1):
            self.values |= dict(zip(names, carried, strict=True))
            condition, *carried = self.block(before)
            ended = turn == min(self.trips, 2)
            if (not condition) if isinstance(condition, int) else ended:
                break
            arguments = after[0].operands if after and after[0].name[0] == "^" else []
            self.values |= dict(zip(arguments, carried, strict=False))
            carried = self.block(after)
        return carried

    # Shared memory.

    def _ttg_local_alloc(self, o: Operation) -> list[Any]:
        ((name, _),) = o.results
        if o.operands:
            filled = _sources([self.value(n) for n in o.operands])
            return [View(Buffer(name, 0, len(self.loops), filled), 0)]
        found = SLOTS.search(o.text)
        if BARRIER.search(o.text):
            return [View(Buffer(name, 1, len(self.loops)), 0)]
        if found is None:
            raise Unfollowed(f"{name}: not an allocation that is followed: {o.text}")
        self.buffers.append(Buffer(name, int(found.group(1)), len(self.loops)))
        return self.buffers[-1:]

    def _ttg_memdesc_index(self, o: Operation) -> list[Any]:
        buffer, slot = (self.value(n) for n in o.operands[:2])
        if not isinstance(buffer, Buffer) or not isinstance(slot, int):
            raise Unfollowed(f"a slot of {o.operands[0]} is not known: {o.operands[1]} = {slot}")
        if not 0 <= slot < buffer.slots:
            raise Unfollowed(f"{buffer.name} has {buffer.slots} slots, no slot {slot}")
        return [View(buffer, slot)]

    _ttg_memdesc_subview = _ttg_memdesc_index  # its name until Triton 3.4

    def _ttg_local_dealloc(self, o: Operation) -> list[Any]:
        return []

    def _ttg_local_store(self, o: Operation) -> list[Any]:
        self.copy(o).arrived = True
        return []

    def _ttg_async_copy_global_to_local(self, o: Operation) -> list[Any]:
        self.open.append(self.copy(o))
        return []

    def _ttg_async_commit_group(self, o: Operation) -> list[Any]:
        for copy in self.open:
            copy.group = self.groups
        self.open.clear()
        self.groups += 1
        return []

    def _ttg_async_wait(self, o: Operation) -> list[Any]:
        self.done = max(self.done, self.groups - o.number("num"))
        return []

    def _ttg_local_load(self, o: Operation) -> list[Any]:
        view = self.place_of(o.operands[0])
        return [self.read(o, view)] if isinstance(view, View) else [UNKNOWN]

    # Tensor memory accelerator: copies that arrive at a barrier, whose uses alternate in parity.

    def _ttng_init_barrier(self, o: Operation) -> list[Any]:
        return []

    _ttng_inval_barrier = _ttng_init_barrier

    def _ttng_barrier_expect(self, o: Operation) -> list[Any]:
        at = self.value(o.operands[0])
        at.buffer.uses[at.slot] = at.buffer.uses.get(at.slot, 0) + 1
        return []

    def _ttng_async_tma_copy_global_to_local(self, o: Operation) -> list[Any]:
        _, at = (v for n in o.operands if isinstance(v := self.place_of(n), View))
        self.copy(o).barrier = (at, at.buffer.uses.get(at.slot, 0))
        return []

    def _ttng_wait_barrier(self, o: Operation) -> list[Any]:
        at, phase = (self.value(n) for n in o.operands[:2])
        if not isinstance(phase, int):
            raise Unfollowed(f"{o.operands[1]}, the phase of a barrier, is not known")
        use = at.buffer.uses.get(at.slot, 0)
        use -= (use - 1) % 2 != phase
        for buffer in self.buffers:
            for copy in buffer.holds.values():
                if copy.barrier is not None and copy.barrier[0] == at and copy.barrier[1] <= use:
                    copy.arrived = True
        for told in [t for t in self.announced if t[0] == at and t[1] <= use]:
            del self.announced[told]
        return []

    # Products.

    def _tt_dot(self, o: Operation) -> list[Any]:
        self.multiply(o)
        return [UNKNOWN]

    def _ttng_warp_group_dot(self, o: Operation) -> list[Any]:
        self.multiply(o)
        if "isAsync = true" in o.text:
            views = (self.value(n) for n in o.operands[:2])
            self.flying.append([v for v in views if isinstance(v, View)])
        return [UNKNOWN]

    def _ttng_warp_group_dot_wait(self, o: Operation) -> list[Any]:
        self.flying = self.flying[max(0, len(self.flying) - o.number("pendings")) :]
        return [self.value(n) for n in o.operands]

    def _ttng_tc_gen5_mma(self, o: Operation) -> list[Any]:
        self.multiply(o)
        left, right, *rest = (self.place_of(n) for n in o.operands)
        barriers = [v for v in rest if isinstance(v, View)]
        if "is_async" in o.text:
            if len(barriers) != 1:
                raise Unfollowed(f"{o.name}: {len(barriers)} barriers tell of its end")
            at = barriers[0]
            use = at.buffer.uses[at.slot] = at.buffer.uses.get(at.slot, 0) + 1
            self.announced[at, use] = [v for v in (left, right) if isinstance(v, View)]
        return []

    def place_of(self, name: str) -> Any:
        """A value; of a buffer that is used as it is, and not by its slots, the only one."""
        value = self.value(name)
        if isinstance(value, Buffer):
            value.slots = 1
            return View(value, 0)
        return value

    def multiply(self, o: Operation) -> None:
        """Both factors must come from one iteration."""
        found: dict[int, set[tuple[str, int]]] = defaultdict(set)
        for n in o.operands[:2]:
            value = self.place_of(n)
            for depth, name, number in self.read(o, value) if isinstance(value, View) else value:
                found[depth].add((name, number))
        for copies in found.values():
            if len({number for _, number in copies}) > 1:
                listed = ", ".join(f"copy {number} of {name}" for name, number in sorted(copies))
                self.faults.append(f"{o.name} multiplies {listed}")

    def copy(self, o: Operation) -> Copy:
        """A copy into the slot among the operands, the first one if a barrier is another."""
        view = next(v for n in o.operands if isinstance(v := self.place_of(n), View))
        buffer, place = view.buffer, self.place(view.buffer)
        if any(view in product for product in (*self.flying, *self.announced.values())):
            self.faults.append(
                f"{buffer.name}, {buffer.slots} slots: copy {buffer.copies} goes into slot "
                f"{view.slot} while a product reads it"
            )
        made = buffer.holds[view.slot] = Copy(buffer.copies)
        buffer.copies += 1
        if place is not None:
            buffer.per_iteration[place] += 1
        return made

    def read(self, o: Operation, view: View) -> frozenset:
        """The copy that a slot holds, as (depth, buffer, number), the source of a tile."""
        buffer, place = view.buffer, self.place(view.buffer)
        if not buffer.slots:
            return buffer.sources
        where = "outside the loop" if place is None else f"in iteration {place[2]}"
        what = f"{buffer.name}, {buffer.slots} slots: {o.name} {where} finds"
        found = buffer.holds.get(view.slot)
        if found is None:
            self.faults.append(f"{what} nothing in slot {view.slot}")
            return UNKNOWN
        if not found.arrived and (found.group is None or found.group >= self.done):
            self.faults.append(f"{what} copy {found.number} before it was waited for")
        buffer.reads.append((place, o, found.number))
        return frozenset({(buffer.depth, buffer.name, found.number)})

    def place(self, buffer: Buffer) -> Place | None:
        """Where in the buffer's loop this is."""
        return self.loops[buffer.depth] if len(self.loops) > buffer.depth else None

    def finish(self) -> None:
        """Every reader must have found copy 0, 1, 2, ..., before, in and after its loop."""
        for buffer in self.buffers:
            inside = [place for place, _, _ in buffer.reads if place is not None]
            if not buffer.copies or not inside:
                continue
            if len({place[:2] for place in (*inside, *buffer.per_iteration)}) > 1:
                raise Unfollowed(f"{buffer.name} is used in several loops")
            if set(buffer.per_iteration.values()) != {1}:
                raise Unfollowed(f"{buffer.name} is not copied into once an iteration")
            kinds: dict[str, list[tuple[Place | None, Operation, int]]] = defaultdict(list)
            for read in buffer.reads:  # a reader and its copies outside the loop are alike
                kinds[f"{read[1].name} {read[1].text.partition(' : ')[2]}"].append(read)
            for reads in kinds.values():
                self.order(buffer, reads, len(buffer.per_iteration))

    def order(
        self, buffer: Buffer, reads: list[tuple[Place | None, Operation, int]], iterations: int
    ) -> None:
        """Readers that go ahead in the loop must have begun before it, and go on after it."""
        ahead: dict[int, int] = {}  # of each reader in the loop
        outside: tuple[list[int], list[int]] = ([], [])  # found before and after it
        what = f"{buffer.name}, {buffer.slots} slots: {reads[0][1].name}"
        for place, o, number in reads:
            if place is None:
                outside[bool(ahead)].append(number)
            elif number != (expected := place[2] + ahead.setdefault(id(o), number - place[2])):
                self.faults.append(
                    f"{what} in iteration {place[2]} finds copy {number}, expected {expected}"
                )
                return
        before, after = (sorted(found) for found in outside)
        starts = list(ahead.values())
        if starts and before != sorted(n for start in starts for n in range(start)):
            self.faults.append(
                f"{what} in iteration 0 finds copy {', '.join(map(str, starts))}; those before: "
                f"{before or 'none'}"
            )
        firsts = [start + iterations for start in starts]
        if starts and not any(
            after == sorted(n for first in firsts for n in range(first, end))
            for end in range(iterations, iterations + len(after) + max(starts) + 1)
        ):
            self.faults.append(f"{what} after {iterations} iterations finds copies {after}")


def _sources(values: list[Any]) -> frozenset:
    """The copies that a result comes from, if its operands come from these."""
    found = UNKNOWN
    for v in values:
        if isinstance(v, frozenset) and v:
            found |= v
    return found
