"""Fixtures shared by the whole suite: real speech and a real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saml_kernels.cpu import native

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def speech_root() -> Path:
    """Folder with real speech (LibriSpeech layout and manifests); see README, "Tests"."""
    root = Path(os.environ.get("SAML_SPEECH", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no speech at {root}; set SAML_SPEECH to a folder that holds LibriSpeech/")
    return root


@pytest.fixture(scope="session")
def tiny_en():
    """Whisper tiny.en, full precision, as (model, processor)."""
    from saml_models.whisper import load_whisper

    return load_whisper("tiny.en")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What a kernel forgets to write is NaN, not what happened to lie there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=(*native.LEVELS, "no native code"), scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests with every instruction set of this machine, and without native code."""
    if request.param == "no native code":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_loaded", lambda: (None, "no native code: a test"))
            yield request.param
        return
    if not native.available():
        pytest.skip(native.native_status())
    if native.select(request.param) != request.param:
        native.select()
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.select()
