"""glibc's allocator, told to keep what training frees, and to give back what a server has freed."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory", "return_freed_memory"]

# malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 1 << 30


def keep_freed_memory() -> bool:
    """Reuse large blocks instead of handing each back to the kernel; whether that took effect.

    A training step frees and asks again for the same blocks of many megabytes. By default glibc
    maps each anew, and the kernel clears it page by page; without that a step of tiny.en took 0.72
    of the time (`python -m bench training-memory`, one thread of a busy two-core AMD EPYC). The
    process keeps its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)


def return_freed_memory() -> bool:
    """Hand pages that hold nothing back to the kernel; whether any were.

    Batches of many shapes leave gaps in the heaps of several threads, which glibc keeps: a server's
    memory creeps up although it holds no more.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    return trim is not None and trim(0) == 1
