"""Voices over HTTP: recorded, learnt in a process that may be killed, taken out and in, deleted."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import small_voices
from serving import Talker, served, wav

from saml_kernels import SAMLError
from saml_models.server.app import create_app
from saml_models.server.engine import Engine
from saml_models.server.learner import divided
from saml_models.server.settings import Limits, Settings
from saml_models.server.voices import Profiles, Voice, Voices
from saml_models.speakers.profile import SpeakerProfile
from saml_models.speakers.store import ProfileStore


@pytest.fixture
def place(tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of a server that learns voices for tiny.en."""
    limits = Limits(clips=6, voices=3)
    settings = Settings("tiny.en", limits, store=tmp_path, load="tiny.en", epochs=8)
    with Engine(Talker()) as engine, served(create_app(engine, settings)) as url:  # type: ignore[arg-type]
        yield httpx.Client(base_url=f"{url}/v1", timeout=60)


ANN = "/speakers/ann"


def record_one(client: httpx.Client, name: str, seconds: float, text: str) -> httpx.Response:
    where = f"/speakers/{name}/clips"
    return client.post(where, files={"file": wav(seconds)}, data={"text": text})


def record(client: httpx.Client, name: str, count: int) -> list[dict[str, Any]]:
    answers = [record_one(client, name, 1 + n / 10, f"this is {n}") for n in range(count)]
    assert all(a.status_code == 201 for a in answers)
    return [a.json() for a in answers]


def test_names_are_refused_alike(place: httpx.Client, tmp_path: Path) -> None:
    names = ("../x", "a\x00", "auto", "AUTO", "/etc/passwd", str(tmp_path), "", ".x", "x" * 60)
    for name in names:
        answer = place.post("/speakers", json={"name": name})
        assert answer.status_code == 400 and "not a name" in answer.json()["error"]["message"]
    for name in ("..%2Fx", "a%00", "auto", "%2Fetc%2Fpasswd", "nobody"):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/profile"), ("POST", "/learn")):
            assert place.request(method, f"/speakers/{name}{path}").status_code == 404
    assert place.get("/speakers").json()["data"] == [] and not list(tmp_path.iterdir())


def test_clips_are_recorded_and_recorded_again(place: httpx.Client, tmp_path: Path) -> None:
    assert place.post("/speakers", json={"name": "ann", "identify": True}).status_code == 201
    assert place.post("/speakers", json={"name": "ann"}).status_code == 409
    assert [c["id"] for c in record(place, "ann", 2)] == ["0001", "0002"]
    said = {"text": " three\n words "}
    again = place.put(f"{ANN}/clips/0001", files={"file": wav(3)}, data=said)
    assert again.json() == {"id": "0001", "text": "three words", "seconds": 3.0}
    assert place.get(f"{ANN}/clips/0001").content.startswith(b"fLaC")
    for text, seconds, message in (("", 1, "text"), ("x" * 2000, 1, "2000"), ("a", 0.1, "0.1 s"),
                                   ("a", 40, "limit")):  # fmt: skip
        answer = record_one(place, "ann", seconds, text)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    for id, status in (("..%2F1", 404), ("0009", 400)):
        answer = place.put(f"{ANN}/clips/{id}", files={"file": wav()}, data={"text": "a"})
        assert answer.status_code == status
    assert place.delete(f"{ANN}/clips/0002").status_code == 204
    assert place.delete(f"{ANN}/clips/0002").status_code == 404
    record(place, "ann", 5)
    full = record_one(place, "ann", 1, "a")
    assert full.status_code == 400 and "limit of clips is 6" in full.json()["error"]["message"]
    found = place.get(ANN).json()
    assert found["identify"] and not found["enrolled"] and len(found["clips"]) == 6
    assert place.get(f"{ANN}/profile").status_code == 404
    assert place.delete(ANN).status_code == 204 and place.get(ANN).status_code == 404
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def children() -> list[int]:
    """Learners that this process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            line = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == os.getpid() and b"saml_models.server.learner" in line:
            found.append(int(path.name))
    return found


@pytest.mark.slow
def test_a_learner_that_is_killed_goes_on(place: httpx.Client, tmp_path: Path) -> None:
    place.post("/speakers", json={"name": "ann"})
    assert place.post(f"{ANN}/learn").status_code == 400  # no clips yet
    record(place, "ann", 6)
    assert place.post(f"{ANN}/learn").json()["state"] in ("queued", "learning")
    assert place.post(f"{ANN}/learn").status_code == 409
    busy = record_one(place, "ann", 1, "a")
    assert busy.status_code == 409 and "is being learnt" in busy.json()["error"]["message"]
    killed, seen = False, []
    with place.stream("GET", f"{ANN}/events", timeout=240) as events:
        for line in events.iter_lines():
            if not line.startswith("data: "):
                continue
            status = json.loads(line[6:])
            if killed and "step" in status:
                seen.append(status["step"])
            if not killed and status.get("step", 0) >= 6:
                (learner,) = children()
                os.kill(learner, signal.SIGKILL)
                killed = True
    assert killed and status["state"] == "learnt", status
    assert min(seen) >= 5  # the last checkpoint; nothing is learnt twice from the beginning
    assert [set(held) for held in status["held"]] == [{"id", "text", "before", "after"}]
    found = place.get(ANN).json()
    assert found["enrolled"] and found["profile"]["utterances"] == 5
    assert found["profile"]["wer_before"] == status["wer_before"]
    assert not list((tmp_path / "enrolment" / "ann").glob("checkpoint*"))

    file = place.get(f"{ANN}/profile").content
    assert place.put("/speakers/eve/profile", files={"file": file}).status_code == 201
    assert place.put("/speakers/eve/profile", files={"file": file}).status_code == 409
    eve = SpeakerProfile.load(tmp_path / "eve.safetensors")
    assert eve.name == "eve" and eve.hash == found["profile"]["hash"]
    damaged = file[:-9] + bytes(9)
    for wrong in (b"", b"no profile", damaged):
        answer = place.put("/speakers/bob/profile", files={"file": wrong})
        assert answer.status_code == 400 and str(tmp_path) not in answer.text
    names = [voice["name"] for voice in place.get("/speakers").json()["data"]]
    assert names == ["ann", "eve"]
    for name in names:
        assert place.delete(f"/speakers/{name}").status_code == 204
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_every_fifth_clip_is_held_back() -> None:
    assert divided(["0001", "0002"]) == (["0001", "0002"], [])
    kept, held = divided([f"{n:04d}" for n in range(1, 12)])
    assert held == ["0005", "0010"] and len(kept) == 9


def test_who_agreed_is_recognised_and_who_is_deleted_is_forgotten(tmp_path: Path) -> None:
    voices = Voices(tmp_path, Profiles(most=1))
    profile = SpeakerProfile.of(small_voices.make(voice=1), speaker="eve")
    file = tmp_path / "given"
    profile.save(file)
    for name, agreed in (("ann", True), ("bob", False)):
        voices.take_in(name, io.BytesIO(file.read_bytes()), agreed)
    assert voices.candidates() == []  # has no embedding
    assert voices.profile("ann") is voices.profile("ann")
    assert voices.profile("bob") is not voices.profile("ann")
    ann = Voice(ProfileStore(tmp_path), "ann")
    ann.delete()
    assert voices.names() == ["bob"]
    ann.status = {"state": "learnt"}  # by a learner that has not heard of it
    assert not ann.exists
    with pytest.raises(KeyError):
        voices.profile("ann")
    ProfileStore(tmp_path).remove("bob")
    with pytest.raises(SAMLError):
        ProfileStore(tmp_path).load("bob")
