import ctypes
import os
import platform
import sys
from pathlib import Path

import pytest

from saml_models.runtime import allocator as memory


def test_glibc_takes_the_settings():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("no glibc")
    assert memory.keep_freed_memory()


def test_what_is_freed_between_other_blocks_is_returned():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("no glibc")
    blocks = [bytes(60_000) for _ in range(2000)]  # below the size that is mapped by itself
    del blocks[::2]
    del blocks[:-1]  # the last one stays, and with it the top of the heap
    before = resident()
    memory.return_freed_memory()
    assert resident() < before - 30e6


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def test_elsewhere_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("loaded a library"))
    assert not memory.keep_freed_memory() and not memory.return_freed_memory()


def test_a_libc_without_mallopt(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory() and not memory.return_freed_memory()
