"""OpenAI's own client against the server, and those who mean it harm."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import small_voices
import soundfile
import torch
from serving import CONTAINERS, Talker, encoded, noise, said, served, wav
from starlette.datastructures import UploadFile

from saml_kernels import SAMLError
from saml_models.models.interface import DecodingOptions
from saml_models.server import engine as engines
from saml_models.server.app import create_app
from saml_models.server.engine import Engine
from saml_models.server.settings import Limits, Settings, is_loopback, read_tokens
from saml_models.server.uploads import decode_upload
from saml_models.server.voices import Voice
from saml_models.speakers.profile import SpeakerProfile
from saml_models.speakers.store import ProfileStore

TOKENS = {"ann": "a" * 20, "bob": "b" * 20}
MIB = 2**20
http = httpx.Client(timeout=60)


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(model="small", store=folder, **changes)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture(scope="module")
def voice() -> SpeakerProfile:
    return SpeakerProfile.of(small_voices.make(voice=1), speaker="eve")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, voice: SpeakerProfile) -> Iterator[Any]:
    """A server without tokens, one enrolled voice, and its address."""
    folder = tmp_path_factory.mktemp("store")
    voice.save(folder / "eve.safetensors")
    limits = Limits(bytes=2 * MIB, seconds=60)
    with (
        Engine(Talker()) as engine,
        served(  # type: ignore[arg-type]
            create_app(engine, settings(folder, limits=limits))
        ) as url,
    ):
        yield url


@pytest.fixture(scope="module")
def client(place: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{place}/v1", api_key="none", max_retries=0)


def test_five_formats(client: openai.OpenAI) -> None:
    create: Any = client.audio.transcriptions.create
    text = " ".join(said(12 * 16000))
    file = ("a.wav", wav(12))
    assert create(file=file, model="small").text == text
    assert create(file=file, model="whisper-1", response_format="text") == text + "\n"
    srt = create(file=file, model="small", response_format="srt")
    assert srt.startswith("1\n00:00:00,000 --> 00:00:05,000\nword0") and "\n3\n" in srt
    assert create(file=file, model="small", response_format="vtt").startswith("WEBVTT\n\n00:00.000")
    found = create(
        file=file, model="small", response_format="verbose_json",
        timestamp_granularities=["word", "segment"], language="en",
    )  # fmt: skip
    assert (found.text, found.language, found.duration) == (text, "english", 12.0)
    assert [(s.start, s.end) for s in found.segments] == [(0, 5), (5, 10), (10, 12)]
    third = found.segments[2]
    assert (third.id, third.seek, third.tokens, third.temperature) == (2, 1000, [7, 7], 0)
    assert (third.avg_logprob, third.compression_ratio, third.no_speech_prob) == (-0.2, 1.1, 0.01)
    assert set(openai.types.audio.TranscriptionSegment.model_fields) == set(third.to_dict())
    assert [w.word for w in found.words] == text.split() and found.words[3].start == 3


def test_a_stream_says_the_whole_text(client: openai.OpenAI) -> None:
    create: Any = client.audio.transcriptions.create
    events = list(create(file=("a.wav", wav(40)), model="small", stream=True))
    deltas = [e.delta for e in events if e.type == "transcript.text.delta"]
    assert len(deltas) > 4 and events[-1].type == "transcript.text.done"
    assert "".join(deltas) == events[-1].text == " ".join(said(40 * 16000))


def test_models_and_speakers(client: openai.OpenAI, voice: SpeakerProfile) -> None:
    assert [m.id for m in client.models.list()] == ["small", "small@eve"]
    assert client.models.retrieve("small@eve").id == "small@eve"
    create: Any = client.audio.transcriptions.create
    file = ("a.wav", wav())
    assert create(file=file, model="small@eve").speaker_hash == voice.hash
    assert create(file=file, model="small", extra_body={"speaker": "eve"}).speaker_hash
    assert create(file=file, model="whisper-1@eve").speaker_hash == voice.hash
    for name in ("small@nobody", "/etc/passwd", "../small", "tiny.en"):
        with pytest.raises(openai.NotFoundError):
            create(file=("a.wav", b"refused before it is decoded"), model=name)
    for name in ("../eve", "eve\x00", "auto ", "eve.safetensors", "/etc/passwd", "x" * 500):
        with pytest.raises(openai.NotFoundError, match="no such voice"):
            create(file=file, model="small", extra_body={"speaker": name})
    with pytest.raises(openai.BadRequestError, match="agreed"):
        create(file=file, model="small", extra_body={"speaker": "auto"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": "xml"}, "verbose_json"),
        ({"language": "xx"}, "xx"),
        ({"temperature": 3}, "temperature"),
        ({"timestamp_granularities[]": "word"}, "verbose_json"),
        ({"prompt": "x" * 3000}, "3000"),
        ({"stream": "perhaps"}, "stream"),
    ],
)
def test_what_is_wrong_with_a_request(place: str, fields: Any, message: str) -> None:
    answer = http.post(
        f"{place}/v1/audio/transcriptions", files={"file": wav()}, data={"model": "small", **fields}
    )
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def forged_flac() -> bytes:
    """One second at 16 kHz that says it has 655,350 samples a second, the most FLAC knows."""
    file = io.BytesIO()
    soundfile.write(file, noise(1), 655_350, format="FLAC")
    return file.getvalue()


def slow_wav() -> bytes:
    """1.9 MB at 1,000 samples a second and 8 bits: half an hour."""
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 1_900_036, b"WAVE", b"fmt ", 16, 1, 1, 1000,
                       1000, 1, 8, b"data", 1_900_000)  # fmt: skip
    return head + bytes(1_900_000)


def nan_wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(16000, np.nan, np.float32), 16000, "FLOAT", format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "file"),
        (b"no audio at all" * 99, "file"),
        (forged_flac(), "655,350"),
        (slow_wav(), "60 seconds"),
        (nan_wav(), "NaN"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "file"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "file"),
    ],
    ids=["empty", "text", "forged rate", "too long", "nan", "playlist", "concat"],
)
def test_files_that_are_none(place: str, file: bytes, message: str) -> None:
    with Peak() as peak:
        answer = http.post(
            f"{place}/v1/audio/transcriptions", files={"file": file}, data={"model": "small"}
        )
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert peak.grown < 60e6


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Peak:
    """The most that this process grows by within the block, in bytes."""

    def __enter__(self) -> Peak:
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would be filled without growing
        self.grown, self._before, self._over = 0, resident(), False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over:
            self.grown = max(self.grown, resident() - self._before)
            time.sleep(0.002)

    def __exit__(self, *error: object) -> None:
        self._over = True
        self._thread.join()


@pytest.mark.parametrize("declared", [True, False])
def test_more_bytes_than_the_limit(place: str, declared: bool) -> None:
    size = 26 * MIB

    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

    def body() -> Iterator[bytes]:
        yield head
        for _ in range(size // MIB):
            yield bytes(MIB)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    if declared:
        headers["Content-Length"] = str(size + len(head))
    with Peak() as peak:
        try:
            answer = http.post(f"{place}/v1/audio/transcriptions", content=body(), headers=headers)
        except (httpx.WriteError, httpx.ReadError):  # hung up on before everything was sent
            answer = None
    assert answer is None or (
        answer.status_code == 413 and "2,097,152" in answer.json()["error"]["message"]
    )
    assert peak.grown < 50e6
    raw = socket.create_connection(place.removeprefix("http://").rsplit(":", 1))  # type: ignore[arg-type]
    raw.sendall(
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 27262976\r\n\r\n"
    )
    assert raw.recv(100).startswith(b"HTTP/1.1 413")
    raw.close()


def test_hours_in_a_few_bytes_take_little_memory() -> None:
    """Joined Opus streams of near silence: half an hour in half a megabyte."""
    part = io.BytesIO()
    soundfile.write(part, noise(60) * 1e-4, 16000, "OPUS", format="OGG")
    joined = io.BytesIO(part.getvalue() * 30)
    taken: list[int] = []
    with Peak() as peak, pytest.raises(SAMLError, match=r"limit is 200 seconds"):
        decode_upload(joined, 200, taken.append)
    assert peak.grown < 60e6 and sum(taken) <= 4 * 16000 * 201


def silent_opus(seconds: float) -> bytes:
    """Ogg Opus: one packet of 120 ms, the longest that there is, again and again."""
    av: Any = pytest.importorskip("av")
    samples, file = 5760, io.BytesIO()
    with av.open(file, "w", format="ogg") as container:
        longest = {"frame_duration": "120"}
        stream = container.add_stream("libopus", rate=48000, layout="mono", options=longest)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, samples), np.float32), format="flt", layout="mono"
        )
        frame.sample_rate = 48000
        said = bytes([*stream.encode(frame), *stream.encode(None)][0])
        for number in range(round(seconds / 0.12)):
            packet = av.Packet(said)
            packet.stream, packet.time_base = stream, Fraction(1, 48000)
            packet.pts = packet.dts = number * samples
            packet.duration = samples
            container.mux(packet)
    return file.getvalue()


def test_eight_hours_of_opus_in_one_upload(tmp_path: Path) -> None:
    """With the limits of `saml serve`: an Ogg does not say how long it is, so it is decoded."""
    file = silent_opus(8 * 3600)
    assert len(file) < 25 * MIB
    with (
        Engine(Talker()) as engine,
        served(create_app(engine, settings(tmp_path))) as url,  # type: ignore[arg-type]
    ):
        with Peak() as peak:
            answer = http.post(
                f"{url}/v1/audio/transcriptions", files={"file": file}, data={"model": "small"}
            )
        message = answer.json()["error"]["message"]
        assert answer.status_code == 400 and "limit is 3,600 seconds" in message
        assert peak.grown < 300e6  # the hour that may be heard takes 230 MB


def test_one_clip_in_seven_containers() -> None:
    """PyAV's own encoders: the same length and level whatever it comes in."""
    pytest.importorskip("av")
    seconds = np.arange(3 * 16000) / 16000  # a vowel that swells: what encoders are made for
    clip = sum(np.sin(2 * np.pi * 150 * n * seconds) / n for n in range(1, 12)) * 0.1
    clip = (clip * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * seconds))).astype(np.float32)
    levels = {}
    for name in CONTAINERS:
        found = decode_upload(io.BytesIO(encoded(clip, name)), 60, lambda size: None)
        assert len(found) / 16000 == pytest.approx(3, abs=0.12), name
        levels[name] = float(np.sqrt(np.square(found[8000:40000]).mean()))  # away from its edges
    assert len(levels) == 7
    whole = float(np.sqrt(np.square(clip[8000:40000]).mean()))
    levels["mp3"] /= 0.95  # LAME turns down what it encodes
    assert levels == pytest.approx(dict.fromkeys(levels, whole), rel=0.02)


def test_without_a_token_nothing_and_with_one_nobody_elses(
    tmp_path: Path, voice: SpeakerProfile
) -> None:
    tokens = {digest(token): owner for owner, token in TOKENS.items()}
    voice.save(tmp_path / "owners" / "bob" / "eve.safetensors")
    with (
        Engine(Talker()) as engine,
        served(  # type: ignore[arg-type]
            create_app(engine, settings(tmp_path, tokens=tokens))
        ) as url,
    ):
        schema = http.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {'a' * 20}"})
        for path, methods in schema.json()["paths"].items():
            for method in methods:
                for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic x"}):
                    answer = http.request(
                        method, url + path.replace("{name}", "eve"), headers=headers
                    )
                    expected = 200 if path in ("/healthz", "/") else 401
                    assert answer.status_code == expected, (method, path)
        assert http.get(f"{url}/metrics").status_code == 401
        for owner, status in (("ann", 404), ("bob", 200)):
            headers = {"Authorization": f"Bearer {TOKENS[owner]}"}
            found = http.get(f"{url}/v1/models", headers=headers).json()["data"]
            assert len(found) == (2 if status == 200 else 1)
            answer = http.post(
                f"{url}/v1/audio/transcriptions", headers=headers, files={"file": wav()},
                data={"model": "small@eve"},
            )  # fmt: skip
            assert answer.status_code == status


def test_other_sites_and_other_names_of_this_address(place: str, tmp_path: Path) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        assert http.get(f"{place}/v1/models", headers=headers).status_code == 403
    for name, value in (("Origin", "http://["), ("Host", "[")):
        answer = http.get(f"{place}/v1/models", headers={name: value})
        assert answer.status_code == 403 and repr(value) in answer.text
    own = {"Origin": place}
    answer = http.get(f"{place}/v1/models", headers=own)
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    friend = "https://friend.example"
    with (
        Engine(Talker()) as engine,
        served(  # type: ignore[arg-type]
            create_app(engine, settings(tmp_path, origins=(friend,)))
        ) as url,
    ):
        answer = http.get(f"{url}/v1/models", headers={"Origin": friend})
        assert answer.headers["access-control-allow-origin"] == friend


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_a_client_that_leaves_and_metrics(tmp_path: Path) -> None:
    talker = Talker(pause=0.05)
    with (
        Engine(talker, max_queue=1) as engine,
        served(  # type: ignore[arg-type]
            create_app(engine, settings(tmp_path))
        ) as url,
    ):
        ask: dict[str, Any] = {
            "url": f"{url}/v1/audio/transcriptions", "files": {"file": wav(300)},
            "data": {"model": "small"},
        }  # fmt: skip
        talker.gate.clear()
        with pytest.raises(httpx.ReadTimeout):  # leaves after a second
            http.post(**ask, timeout=httpx.Timeout(30, read=1.0))
        until(lambda: not engine.waiting)  # while the window is still heard
        talker.gate.set()
        with http.stream("POST", **ask | {"data": {"model": "small", "stream": "true"}}) as answer:
            assert next(answer.iter_lines()).startswith("data: ")  # and leaves
        until(lambda: not engine.waiting)
        assert engine.counts.cancelled == 2
        talker.gate.clear()
        job = engine.submit(noise(200), None, DecodingOptions("en"))
        taken, refused = [], ask | {"files": {"file": wav(60)}}
        for _ in range(5):
            began = time.perf_counter()
            answer = http.post(**refused, timeout=30)
            taken.append(time.perf_counter() - began)
            assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
        assert min(taken) < 0.1
        engine.cancel(job)
        talker.gate.set()
        text = http.get(f"{url}/metrics").text
        assert "saml_cancelled_total 3.0" in text and 'status="429"' in text
        assert http.get(f"{url}/healthz").json() == {"status": "ok"}


def ask(url: str, file: bytes, **fields: str) -> httpx.Response:
    where = f"{url}/v1/audio/transcriptions"
    return http.post(where, files={"file": file}, data={"model": "small", **fields})


def test_what_is_the_servers_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients ask again after 500 and 503; after 400 they do not."""

    def full(*given: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left")

    def fault(answer: httpx.Response) -> tuple[int, str]:
        error = answer.json()["error"]
        assert error["type"] == "server_error" and str(tmp_path) not in answer.text
        return answer.status_code, error["message"]

    (tmp_path / "ann.safetensors").write_bytes(b"damaged")
    with (
        Engine(Talker(pause=0.05)) as engine,
        served(create_app(engine, settings(tmp_path))) as url,  # type: ignore[arg-type]
    ):
        status, message = fault(ask(url, wav(), speaker="ann"))
        assert status == 500 and message.startswith("ann.safetensors: not a whole")
        with monkeypatch.context() as patch:
            patch.setattr(UploadFile, "write", full)
            assert fault(ask(url, wav())) == (500, "upload: cannot be kept: No space left")
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(ask, url, wav(300))
            streamed = pool.submit(ask, url, wav(300), stream="true")
            until(lambda: engine.waiting == 2)
            engine.close()
        assert fault(asked.result()) == (503, "engine: is closed; start another")
        assert streamed.result().text.count('"server_error"') == 1
        assert fault(ask(url, b"refused before it is decoded"))[0] == 503


def test_profiles_are_read_beside_the_event_loop(
    tmp_path: Path, voice: SpeakerProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    load = SpeakerProfile.load

    def watched(path: Path) -> SpeakerProfile:
        threads.append(threading.current_thread().name)
        return load(path)

    monkeypatch.setattr(SpeakerProfile, "load", watched)
    monkeypatch.setattr(engines, "identify", lambda *given: SimpleNamespace(profile=given[2][0]))
    for name in ("ann", "eve"):
        one = Voice(ProfileStore(tmp_path), name)
        replace(voice, embedding=torch.zeros(2, 4)).save(one.path)
        one.create(identify=name == "ann")
    with (
        Engine(Talker()) as engine,
        served(create_app(engine, settings(tmp_path))) as url,  # type: ignore[arg-type]
    ):
        for name in ("auto", "eve"):
            assert ask(url, wav(), speaker=name).json()["speaker_hash"] == voice.hash
    assert threads == ["AnyIO worker thread"] * 2


def test_tokens_files_and_addresses(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# who\n\nann {TOKENS['ann']}\nbob {TOKENS['bob']}\n")
    assert sorted(read_tokens(path).values()) == ["ann", "bob"]
    for text, message in (
        ("", "no tokens"), ("ann short", "line 1"), (f"../x {'c' * 20}", "../x"),
        (f"ann {'c' * 20}\nbob {'c' * 20}", "already"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(SAMLError, match=message):
            read_tokens(path)
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.9.9.9")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
