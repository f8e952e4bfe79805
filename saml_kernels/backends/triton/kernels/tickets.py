"""Work handed out by tickets within one launch: what comes first, who waits, who clears up.

CUDA promises no order of programs, and other streams may hold part of the device. A program takes
its work by a ticket, an atomic counter, so that whoever waits knows that what it waits for has been
started: the pieces of a row of tiles come before the row's other work, and wait for nobody.

Counters, int32, are zero before a launch and after it: tickets; programs that have left; for each
row how many pieces have arrived and whether what they make is there; for each tile how many of its
shares have arrived. Whoever leaves last puts them back, so that a captured graph can be replayed.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["arrive", "leave", "sum_shares", "wait", "work_of"]


@triton.jit
def work_of(ticket, rows, pieces, others, GROUP: tl.constexpr):
    """Ticket -> (row of tiles, whether its work is one of the row's pieces, which one).

    GROUP rows at a time: all their pieces, then their other work, with rows side by side, so that
    programs that run together read the same of both operands.
    """
    group = GROUP * (pieces + others)
    first = (ticket // group) * GROUP
    height = tl.minimum(rows - first, GROUP)
    number = ticket % group
    of_piece = number < height * pieces
    rest = number - height * pieces
    row = first + tl.where(of_piece, number // tl.maximum(pieces, 1), rest % height)
    return row, of_piece, tl.where(of_piece, number % tl.maximum(pieces, 1), rest // height)


@triton.jit
def arrive(counter):
    """How many had arrived before; what this program and they have stored can then be read."""
    tl.debug_barrier()  # every thread's stores come before the count
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit
def wait(flag, ACQUIRE: tl.constexpr):
    """Until `flag` is no longer zero; what was written before it was set can then be read."""
    if ACQUIRE == "":
        while tl.atomic_add(flag, 0, sem="acquire") == 0:
            pass
    else:
        seen = tl.inline_asm_elementwise(
            ACQUIRE, "=r,l", [flag], dtype=tl.int32, is_pure=False, pack=1
        )
        while seen == 0:
            seen = tl.inline_asm_elementwise(
                ACQUIRE, "=r,l", [flag], dtype=tl.int32, is_pure=False, pack=1
            )
    tl.debug_barrier()


@triton.jit
def leave(counters, leaving, rows):
    """The last of so many `leaving` programs knows that nobody waits: it clears the counters."""
    tl.debug_barrier()
    if tl.atomic_add(counters + 1, 1, sem="acq_rel") == leaving - 1:
        for first in tl.range(0, 2 + 2 * rows, 64, num_stages=1):
            which = first + tl.arange(0, 64)
            tl.store(counters + which, tl.zeros((64,), tl.int32), which < 2 + 2 * rows)


@triton.jit
def sum_shares(first, where, mask, size, SHARES, TOGETHER: tl.constexpr):
    """Sum of `SHARES` tiles that lie `size` apart, in order; TOGETHER loads are under way at once.

    Other programs wrote them: they are read past the first-level cache.
    """
    total = tl.zeros(where.shape, tl.float32)
    for share in tl.range(0, SHARES, TOGETHER, num_stages=1):
        for i in tl.static_range(TOGETHER):
            exists = tl.full(where.shape, share + i, tl.int32) < SHARES
            at = first + (share + i) * size + where
            total += tl.load(at, mask & exists, 0.0, cache_modifier=".cg")
    return total
