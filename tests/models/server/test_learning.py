"""The queue of voices to learn goes on whatever becomes of one of them."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saml_kernels import SAMLError
from saml_models.server import voices
from saml_models.server.learning import Learning
from saml_models.server.settings import Settings
from saml_models.server.voices import Voice, is_running
from saml_models.speakers.store import ProfileStore


class Ended:
    """A process that has learnt."""

    async def wait(self) -> int:
        return 0

    def kill(self) -> None:
        raise ProcessLookupError


def test_one_error_leaves_the_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process for ann, a damaged file of bob's, one of dan's that cannot be written."""
    started: list[str] = []
    write = voices.write_json

    async def start(*command: str) -> Ended:
        started.append(command[4])
        if command[4] == "ann":
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        Voice(ProfileStore(tmp_path), command[4]).status = {"state": "learnt"}
        return Ended()

    def write_json(path: Path, value: Any) -> None:
        if path.parent.name == "dan":
            raise SAMLError(f"{path}: cannot be written")
        write(path, value)

    async def learn_all() -> None:
        learning = Learning(Settings(store=tmp_path))
        await learning.start()
        try:
            for voice in all_of_them:
                learning.begin(voice)
            (bob.folder / "status.json").write_text("{")
            monkeypatch.setattr(voices, "write_json", write_json)
            async with asyncio.timeout(10):
                while is_running(eve.status):
                    await asyncio.sleep(0.01)
        finally:
            await learning.stop()

    all_of_them = [Voice(ProfileStore(tmp_path), name) for name in ("ann", "bob", "dan", "eve")]
    ann, bob, dan, eve = all_of_them
    for voice in all_of_them:
        voice.add(np.zeros(8000, np.float32), "a", None, most=1)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    asyncio.run(learn_all())
    assert started == ["ann", "eve"] and eve.status == {"state": "learnt"}
    assert ann.status["state"] == "failed" and "Resource" in ann.status["error"]
    assert bob.status["state"] == "failed" and "status.json" in bob.status["error"]
    assert dan.status["state"] == "queued"
