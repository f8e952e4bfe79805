import ctypes
import platform
import sys

import pytest

from saml_models.runtime import allocator as memory


def test_glibc_takes_the_settings():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("no glibc")
    assert memory.keep_freed_memory()


def test_elsewhere_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("loaded a library"))
    assert not memory.keep_freed_memory()


def test_a_libc_without_mallopt(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
