"""`saml serve` as a process, with tiny.en: what it says, and what is left when it is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import CONTAINERS, encoded, wav

from saml_models.data.corpora import load_corpus

STARTED = 90.0  # seconds that it may take on a busy machine
CLIPS = 10
FAR = 6  # steps of learning, after which a checkpoint is there
TOLD = 400.0  # seconds until the voice has to be learnt


@contextmanager
def running(store: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """`saml serve` in a process of its own, and a client of it once it answers."""
    call = [
        sys.executable, "-m", "saml_models.cli", "serve", "--model", "tiny.en", "--port", "0",
        "--store", str(store),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            said = re.search(r"http://\S+", process.stdout.readline())
            assert said is not None
            with httpx.Client(base_url=said[0], timeout=60) as client:
                until(lambda: answers(client), STARTED)
                yield process, client
        finally:
            process.kill()


def answers(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/healthz").json() == {"status": "ok"}
    return False


def until(reached: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def text(client: httpx.Client, file: bytes, **fields: str) -> str:
    answer = client.post(
        "/v1/audio/transcriptions", files={"file": file}, data={"model": "tiny.en", **fields}
    )
    assert answer.status_code == 200, answer.text
    said: str = answer.json()["text"]
    return said


def learners(parent: int) -> list[int]:
    """Processes that a server has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(path.name))
    return found


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_learns(tmp_path: Path, speech_root: Path) -> None:
    spoken = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])
    clip = min((u.load() for u in spoken), key=lambda c: abs(len(c) - 4 * 16000))
    file = encoded(clip, "wav")
    with running(tmp_path) as (process, client):
        expected = text(client, file)
        assert len(expected.split()) > 3
        assert text(client, wav_of(np.zeros(32000, np.float32))) == ""
        assert {text(client, encoded(clip, name)) for name in CONTAINERS} == {expected}
        assert client.post("/v1/speakers", json={"name": "ann"}).status_code == 201
        for number in range(CLIPS):
            answer = client.post(
                "/v1/speakers/ann/clips",
                files={"file": wav(1 + number / 10)}, data={"text": f"this is {number}"},
            )  # fmt: skip
            assert answer.status_code == 201
        recorded = client.get("/v1/speakers/ann").json()["clips"]
        client.post("/v1/speakers/ann/learn").raise_for_status()
        until(lambda: status(client).get("step", 0) >= FAR, TOLD)
        assert text(client, file) == expected  # it learns beside
        (learner,) = learners(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not is_there(learner), 20)  # nobody writes on
    left = json.loads((tmp_path / "enrolment" / "ann" / "status.json").read_text())
    assert left["state"] == "learning" and left["step"] < left["steps"]

    with running(tmp_path) as (process, client):
        assert client.get("/v1/speakers/ann").json()["clips"] == recorded
        assert text(client, file) == expected
        seen = []
        with client.stream("GET", "/v1/speakers/ann/events", timeout=TOLD) as events:
            for line in events.iter_lines():
                if line.startswith("data: "):
                    last = json.loads(line[6:])
                    seen.append(last.get("step", left["step"]))
        assert last["state"] == "learnt", last
        assert min(seen) >= FAR - 1  # from the checkpoint on, not from the beginning
        found = client.get("/v1/speakers/ann").json()
        assert found["enrolled"] and found["profile"]["utterances"] == CLIPS * 4 // 5
        assert text(client, file, speaker="ann").split()
        assert text(client, file) == expected


def status(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/v1/speakers/ann").json()["status"]
    return found


def wav_of(samples: np.ndarray) -> bytes:
    return encoded(samples, "wav")
