"""The server: many speakers at once, clips beside a long file, memory.

    python -m bench serve --data LibriSpeech/test-other --json bench/results/serve.json

Sixteen speakers are the pretrained experts, each changed at random: their text is not the point,
that it is the same in a batch and alone is. Times are ratios within one process: at once and one
after the other in turn, the median over the rounds. Requests go over HTTP on this machine.
"""

from __future__ import annotations

import gc
import io
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import torch
import typer

from bench.models.clips import at_once, spread
from saml_kernels.files import write_json
from saml_models.data.audio import SAMPLE_RATE
from saml_models.data.corpora import load_corpus
from saml_models.models.interface import DecodingOptions
from saml_models.models.registry import bind
from saml_models.runtime.machine import processor
from saml_models.runtime.quiet import quiet_libraries
from saml_models.server.app import create_app
from saml_models.server.engine import Engine
from saml_models.server.settings import Settings
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile
from saml_models.transcription.recordings import transcribe

PLAIN = DecodingOptions("en", timestamps=False)
TIMED = DecodingOptions("en")
CHANGE = 0.01  # of each of a speaker's weights, of their standard deviation 1
CLIENTS = 8
SETTLED = 100  # requests after which memory is not to grow


def voices(network: Any, count: int) -> list[SpeakerProfile]:
    """Profiles that say different things."""
    made = []
    for seed in range(count):
        with network.saml.snapshot(), torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for parameter in network.saml.experts().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * CHANGE)
            made.append(SpeakerProfile.of(network, speaker=f"voice {seed}"))
    return made


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it gives."""
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def at_once_or_in_turn(
    engine: Engine, clips: Sequence[Any], speakers: Sequence[SpeakerProfile], rounds: int
) -> dict[str, Any]:
    """How much faster a batch of many speakers is, and whether it says the same."""

    def together() -> list[str]:
        jobs = [engine.submit(c, s, PLAIN) for c, s in zip(clips, speakers, strict=True)]
        return [job.future.result().text for job in jobs]

    def in_turn() -> list[str]:
        return [
            engine.submit(c, s, PLAIN).future.result().text
            for c, s in zip(clips, speakers, strict=True)
        ]

    together()
    ratios, sizes = [], []
    texts: list[str] = []
    alone: list[str] = []
    for _ in range(rounds):
        batches, pieces = engine.counts.batches, engine.counts.pieces
        fast, texts = timed(together)
        sizes.append((engine.counts.pieces - pieces) / (engine.counts.batches - batches))
        slow, alone = timed(in_turn)
        ratios.append(slow / fast)
    model = engine.speech
    by_command = engine.call(
        lambda: [
            transcribe(model.network, model.processor, c, s, timestamps=False).text
            for c, s in zip(clips, speakers, strict=True)
        ]
    ).result()
    return {
        "speakers": len(clips),
        "faster than one after the other": round(statistics.median(ratios), 2),
        "mean batch": round(statistics.mean(sizes), 1),
        "texts as alone": sum(a == b for a, b in zip(texts, by_command, strict=True)),
        "texts as one after the other": sum(a == b for a, b in zip(texts, alone, strict=True)),
    }


def beside_a_long_one(engine: Engine, clip: Any, long: Any, rounds: int) -> dict[str, Any]:
    """How long a short clip takes alone, and while a long recording is heard."""
    alone = statistics.median(
        timed(lambda: engine.submit(clip, None, PLAIN).future.result())[0] for _ in range(rounds)
    )
    windows: list[float] = []
    job = engine.submit(
        long, None, TIMED, on_progress=lambda done, seconds: windows.append(time.perf_counter())
    )
    while len(windows) < 2:
        time.sleep(0.01)
    beside = []
    for _ in range(rounds):
        beside.append(timed(lambda: engine.submit(clip, None, PLAIN).future.result())[0])
        time.sleep(alone)
    done = job.future.done()
    engine.cancel(job)
    window, longest = statistics.median(np.diff(windows)), max(np.diff(windows))
    return {
        "seconds of the long recording": round(len(long) / SAMPLE_RATE),
        "it was heard all the while": not done,
        "seconds alone": round(alone, 3),
        "seconds of a window": round(float(window), 3),
        "seconds of the longest window": round(float(longest), 3),
        "median seconds beside it": round(statistics.median(beside), 3),
        "worst seconds beside it": round(max(beside), 3),
    }


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
    """How memory grows over mixed requests, `CLIENTS` at a time."""
    import httpx

    files = []
    for clip in clips:
        file = io.BytesIO()
        soundfile.write(file, clip, SAMPLE_RATE, format="FLAC")
        files.append(file.getvalue())
    formats = ("json", "verbose_json", "srt", "text")
    memory: list[int] = []

    with (
        served(create_app(engine, Settings("model", store=store))) as url,
        httpx.Client(base_url=url, timeout=600) as client,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):

        def ask(number: int) -> int:
            name = names[number % len(names)] if number % 3 else ""
            answer = client.post(
                "/v1/audio/transcriptions",
                files={"file": files[number % len(files)]},
                data={
                    "model": f"model@{name}" if name else "model",
                    "response_format": formats[number % len(formats)],
                    "stream": str(number % 5 == 4).lower(),
                },
            )
            memory.append(resident())
            return answer.status_code

        seconds, statuses = timed(lambda: list(pool.map(ask, range(requests))))
    gc.collect()
    settled = max(memory[: min(SETTLED, len(memory))])
    return {
        "requests": requests,
        "answered": sum(status == 200 for status in statuses),
        "requests a second": round(requests / seconds, 2),
        "MB after the first 100": round(settled / 1e6, 1),
        "growth until the last, %": round(100 * (max(memory[-20:]) / settled - 1), 2),
    }


def main(
    data: Annotated[Path, typer.Option(help="A corpus.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    speakers: Annotated[int, typer.Option(min=2)] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    minutes: Annotated[float, typer.Option(help="Of the long recording.")] = 30.0,
    requests: Annotated[int, typer.Option(help="0 leaves them out.")] = 1000,
    threads: Annotated[int, typer.Option()] = 2,
    json: Annotated[Path | None, typer.Option(help="Where the numbers go.")] = None,
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    clips = [u.load() for u in spread(at_once(load_corpus(data)), speakers)]
    short = np.concatenate(clips)[: 3 * SAMPLE_RATE]
    whole = np.concatenate(clips)
    long = np.tile(whole, 1 + int(minutes * 60 * SAMPLE_RATE) // len(whole))
    network, features = load_adaptable(model)
    profiles = voices(network, len(clips))
    found: dict[str, Any] = {"model": model, "processor": processor(), "threads": threads}

    def noted(name: str, row: dict[str, Any]) -> None:
        found[name] = row
        typer.echo(f"{name}: {row}")
        if json is not None:
            write_json(json, found)

    with Engine(bind(network, features), max_batch=len(clips)) as engine:
        noted("many speakers", at_once_or_in_turn(engine, clips, profiles, rounds))
        cut = long[: int(minutes * 60 * SAMPLE_RATE)]
        noted("short beside long", beside_a_long_one(engine, short, cut, 3 * rounds))
        if requests:
            import tempfile

            with tempfile.TemporaryDirectory() as folder:
                for profile in profiles:
                    profile.save(Path(folder) / f"{profile.name}.safetensors")
                names = [profile.name for profile in profiles]
                row = memory_over_requests(engine, clips, names, Path(folder), requests)
            noted("memory", row)


if __name__ == "__main__":
    typer.run(main)
