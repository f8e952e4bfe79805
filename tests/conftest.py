"""Fixtures shared by the whole suite: real speech and a real model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
