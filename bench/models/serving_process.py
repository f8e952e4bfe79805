"""The server as a process: memory over many requests, its start, and what its extra installs."""

from __future__ import annotations

import gc
import io
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import soundfile
from packaging.requirements import Requirement

from bench.place import REPOSITORY
from saml_kernels.errors import SAMLError
from saml_models.data.audio import SAMPLE_RATE
from saml_models.server.app import create_app
from saml_models.server.engine import Engine
from saml_models.server.settings import Settings

__all__ = ["added_bytes", "memory_over_requests", "ready_after", "served"]

CLIENTS = 8
SETTLED = 100  # requests after which memory is not to grow
LAST = 50  # requests at the end whose memory is compared
FORMATS = ("json", "verbose_json", "srt", "text", "vtt")
FILES = (("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"))
STARTED = 60.0  # seconds that a server has to answer


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Within the block the application answers at the address that is yielded."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def memory_over_requests(
    engine: Engine, clips: Sequence[Any], names: Sequence[str], store: Path, requests: int
) -> dict[str, Any]:
    """How memory grows over mixed requests, `CLIENTS` at a time.

    They differ in voice, file format, answer, streaming and word times; one in ten is refused (no
    audio, or no such voice) and one in ten leaves before its answer.
    """
    import httpx

    files = []
    for number, clip in enumerate(clips):
        file, (format, kind) = io.BytesIO(), FILES[number % len(FILES)]
        soundfile.write(file, clip, SAMPLE_RATE, kind, format=format)
        files.append(file.getvalue())
    memory: list[int] = []

    with (
        served(create_app(engine, Settings("model", store=store))) as url,
        httpx.Client(base_url=url, timeout=600) as client,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):

        def ask(number: int) -> str:
            name = names[number % len(names)] if number % 3 else ""
            format = FORMATS[number % len(FORMATS)]
            file = files[number % len(files)]
            fields = {
                "model": f"model@{name}" if name else "model",
                "response_format": format,
                "stream": str(number % 7 == 4).lower(),
            }
            if format == "verbose_json" and number % 2:
                fields["timestamp_granularities[]"] = "word"
            if number % 20 == 3:
                file = b"no audio at all"
            elif number % 20 == 13:
                fields["speaker"] = fields["model"] = "model@nobody"
            patience = 0.05 if number % 10 == 7 else 600
            try:
                answer = client.post(
                    "/v1/audio/transcriptions", files={"file": file}, data=fields, timeout=patience
                )
                said = str(answer.status_code)
            except httpx.TimeoutException:
                said = "left"
            memory.append(resident())
            return said

        began = time.perf_counter()
        answers = list(pool.map(ask, range(requests)))
        seconds = time.perf_counter() - began
    gc.collect()
    settled = max(memory[:SETTLED])
    return {
        "requests": requests,
        "answers": {said: answers.count(said) for said in sorted(set(answers))},
        "requests a second": round(requests / seconds, 2),
        "MB after the first 100": round(settled / 1e6, 1),
        "MB at most after them": round(max(memory[SETTLED:], default=settled) / 1e6, 1),
        "growth, %": round(100 * (max(memory[-LAST:]) / settled - 1), 2),
    }


def ready_after(model: str, rounds: int) -> dict[str, Any]:
    """Seconds from the start of `saml serve` to the first answer of /healthz."""
    import httpx

    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        call = [sys.executable, "-m", "saml_models.cli", "serve", "--model", model, "--port", "0"]
        with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                said = re.search(r"http://\S+", process.stdout.readline())
                if said is None:
                    raise SAMLError(f"saml serve --model {model}: did not start")
                while time.perf_counter() - began < STARTED:
                    try:
                        if httpx.get(f"{said[0]}/healthz").status_code == 200:
                            break
                    except httpx.TransportError:
                        time.sleep(0.02)
                seconds.append(time.perf_counter() - began)
            finally:
                process.terminate()
    return {
        "seconds until it answers": round(statistics.median(seconds), 2),
        "slowest start": round(max(seconds), 2),
        "starts": rounds,
    }


def added_bytes() -> dict[str, Any]:
    """What the extra `serve` installs that `whisper` does not: bytes of the files, by package."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = [line for line in extras["serve"] if not line.startswith(project["name"])]
    whisper = _needed([*project["dependencies"], *extras["whisper"]])
    serve = _needed(own)
    sizes = {name: _size(serve[name]) for name in serve.keys() - whisper.keys()}
    ordered = sorted(sizes, key=lambda name: -sizes[name])
    return {
        "MB of packages": round(sum(sizes.values()) / 1e6, 1),
        "packages": {name: round(sizes[name] / 1e6, 2) for name in ordered},
    }


def _needed(requirements: Sequence[str]) -> dict[str, Distribution]:
    """Distributions that requirements install, all that they need among them."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError as error:
            raise SAMLError(f"{name}: is not installed; install the extra `serve`") from error
        for line in found[name].requires or ():
            needed = Requirement(line)
            extras = wanted.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(needed)
    return found


def _size(package: Distribution) -> int:
    """Bytes of an installed distribution's files, without compiled Python."""
    paths = [Path(str(file.locate())) for file in package.files or () if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file())
