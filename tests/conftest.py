"""Fixtures shared by the whole suite: real speech and a real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saml_kernels.backends.cpu import native

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
    from saml_models.models.whisper.loading import load_whisper

    return load_whisper("tiny.en")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What a kernel forgets to write is NaN, not what happened to lie there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Streams and CUDA graphs without a GPU: what is captured runs at once, a replay does nothing.

    `.replayed` is called at each replay, `.before` is the stream outside of captures, and `.told`
    lists what was made current.
    """
    before = SimpleNamespace(
        device=torch.device("cpu"), device_index=1, wait_stream=lambda other: None
    )
    fakes = SimpleNamespace(replayed=lambda: None, before=before, told=[])
    side = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: fakes.replayed())
    for name, fake in {
        "Stream": lambda: side, "current_stream": lambda: before, "CUDAGraph": lambda: graph,
        "stream": lambda s: nullcontext(), "graph": lambda *given, **how: nullcontext(),
        "graph_pool_handle": lambda: (0, 7), "set_stream": fakes.told.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return fakes


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
