"""Voices over HTTP: recorded, learnt in a process that may be killed, taken out and in, deleted."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import small_voices
import torch
from serving import Talker, served, wav

from saml_kernels import SAMLError
from saml_models.server import requests
from saml_models.server.app import create_app
from saml_models.server.engine import Engine
from saml_models.server.learner import divided
from saml_models.server.requests import Server
from saml_models.server.settings import Limits, Settings
from saml_models.server.uploads import decode_upload
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


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


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
    assert not files(tmp_path)


@pytest.mark.parametrize(("meanwhile", "code"), [("deleted", 404), ("queued", 409)])
def test_a_voice_that_is_deleted_or_learnt_while_a_clip_is_decoded(
    place: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str, code: int
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def held(*given: Any) -> Any:
        begun.set()
        go_on.wait(30)
        return decode_upload(*given)

    monkeypatch.setattr(requests, "decode_upload", held)
    place.post("/speakers", json={"name": "ann"})
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(record_one, place, "ann", 1, "a")
        assert begun.wait(30)
        if meanwhile == "deleted":
            assert place.delete(ANN).status_code == 204
        else:
            Voice(ProfileStore(tmp_path), "ann").status = {"state": meanwhile}
        before = files(tmp_path)
        go_on.set()
    assert answer.result().status_code == code
    assert files(tmp_path) == before


def test_twenty_clips_deleted_at_once(place: httpx.Client, tmp_path: Path) -> None:
    ann = Voice(ProfileStore(tmp_path), "ann")
    ids = [ann.add(np.zeros(8000, np.float32), "a", None, most=20) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda id: place.delete(f"{ANN}/clips/{id}"), ids))
    assert [answer.status_code for answer in answers] == [204] * 20
    assert place.get(ANN).json()["clips"] == [] and not list(tmp_path.rglob("*.flac"))


def test_a_full_disk_is_the_servers_fault_and_a_bad_profile_the_clients(
    place: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    given = tmp_path / "given"
    SpeakerProfile.of(small_voices.make(voice=1), speaker="eve").save(given)
    file = {"file": given.read_bytes()}
    place.post("/speakers", json={"name": "ann"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for answer in (
            record_one(place, "ann", 1, "a"),
            place.post("/speakers", json={"name": "bob"}),
            place.put("/speakers/bob/profile", files=file),
        ):
            error = answer.json()["error"]
            assert answer.status_code == 500 and error["type"] == "server_error"
            assert "No space left" in error["message"] and str(tmp_path) not in answer.text
    refused = place.put("/speakers/bob/profile", files={"file": b"no profile"})
    assert refused.status_code == 400 and "profile" in refused.json()["error"]["message"]
    taken = place.put("/speakers/bob/profile", files=file, data={"identify": "true"})
    assert taken.status_code == 201 and taken.json()["identify"] and taken.json()["enrolled"]
    assert SpeakerProfile.load(tmp_path / "bob.safetensors").name == "bob"
    (tmp_path / "enrolment" / "ann" / "voice.json").write_text("{")
    damaged = place.get(ANN)
    assert damaged.status_code == 500 and "voice.json" in damaged.json()["error"]["message"]
    assert [voice["name"] for voice in place.get("/speakers").json()["data"]] == ["bob"]


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
    assert not files(tmp_path)


def test_every_fifth_clip_is_held_back() -> None:
    assert divided(["0001", "0002"]) == (["0001", "0002"], [])
    kept, held = divided([f"{n:04d}" for n in range(1, 12)])
    assert held == ["0005", "0010"] and len(kept) == 9


def test_who_agreed_is_recognised_and_who_is_deleted_is_forgotten(tmp_path: Path) -> None:
    voices = Voices(tmp_path, Profiles(most=1))
    profile = SpeakerProfile.of(small_voices.make(voice=1), speaker="eve")
    for name, agreed in (("ann", True), ("bob", False)):
        Voice(voices.store, name).enrol(profile, agreed)
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


def test_eighty_voices_are_read_once_and_a_damaged_one_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(Engine(Talker()), Settings("small", store=tmp_path))  # type: ignore[arg-type]
    voices = Voices(tmp_path, server.profiles)
    plain = SpeakerProfile.of(small_voices.make(voice=1), speaker="ann")
    profile = replace(plain, embedding=torch.zeros(2, 4))
    for number in range(80):
        voice = Voice(voices.store, f"voice{number}")
        profile.save(voice.path)
        voice.create(identify=True)
    assert len(voices.candidates()) == 80
    (tmp_path / "enrolment" / "voice7" / "voice.json").write_text("{")
    with monkeypatch.context() as patch:
        patch.delattr(SpeakerProfile, "load")
        assert len(voices.candidates()) == 79
