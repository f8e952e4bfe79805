"""The server: many speakers at once, a long file, memory, its start.

    python -m bench serve --data LibriSpeech/test-other --json bench/results/serve.json

The speakers are the pretrained experts, each changed at random: their text is not the point, that
it is the same in a batch and alone is. Times are ratios within one process: the contenders take
turns, and a ratio is the median over the rounds. Requests go over HTTP on this machine. `--only`
measures some of these again and leaves what the file holds of the others.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from bench.models.clips import at_once, spread
from bench.models.serving_process import added_bytes, memory_over_requests, ready_after
from bench.report.environment import device_name
from saml_kernels.backends.cpu.backend import native_status
from saml_kernels.errors import SAMLError
from saml_kernels.files import read_json, write_json
from saml_models.data.audio import SAMPLE_RATE
from saml_models.data.corpora import load_corpus
from saml_models.models.interface import DecodingOptions, SpeechModel
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries
from saml_models.server.engine import Engine
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile
from saml_models.transcription.recordings import transcribe

PLAIN = DecodingOptions("en", timestamps=False)
TIMED = DecodingOptions("en")
CHANGE = 0.01  # of each of a speaker's weights, of their standard deviation 1
UNDISTURBED = 5  # windows of a long recording before a short clip comes
PHASES = 4
PARTS = ("speakers", "more", "long", "memory", "start")


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
    engine: Engine, clips: Sequence[Any], speakers: list[SpeakerProfile], rounds: int
) -> dict[str, Any]:
    """How much faster a batch of many speakers is, what it costs, and whether it says the same."""

    def in_turn() -> list[str]:
        return [
            engine.submit(c, s, PLAIN).future.result().text
            for c, s in zip(clips, speakers, strict=True)
        ]

    together(engine, clips, speakers)
    faster, over_one, sizes = [], [], []
    texts: list[str] = []
    alone: list[str] = []
    for _ in range(rounds):
        batches, pieces = engine.counts.batches, engine.counts.pieces
        many, texts = timed(lambda: together(engine, clips, speakers))
        sizes.append((engine.counts.pieces - pieces) / (engine.counts.batches - batches))
        one, _ = timed(lambda: together(engine, clips, speakers[:1] * len(clips)))
        turns, alone = timed(in_turn)
        faster.append(turns / many)
        over_one.append(many / one)
    model = engine.speech
    by_command = engine.call(
        lambda: [
            transcribe(model.network, model.processor, c, s, timestamps=False).text
            for c, s in zip(clips, speakers, strict=True)
        ]
    ).result()
    return {
        "speakers": len(clips),
        "rounds": rounds,
        "faster": round(statistics.median(faster), 2),
        "each round": [round(ratio, 2) for ratio in faster],
        "over one speaker": round(statistics.median(over_one), 2),
        "batch": round(statistics.mean(sizes), 1),
        "texts as alone": sum(a == b for a, b in zip(texts, by_command, strict=True)),
        "texts as one after the other": sum(a == b for a, b in zip(texts, alone, strict=True)),
    }


def together(engine: Engine, clips: Sequence[Any], speakers: Sequence[SpeakerProfile]) -> list[str]:
    """Texts of clips that are asked for at once."""
    jobs = [engine.submit(c, s, PLAIN) for c, s in zip(clips, speakers, strict=True)]
    return [job.future.result().text for job in jobs]


def over_one_speaker(
    speech: SpeechModel, clips: Sequence[Any], speakers: list[SpeakerProfile], rounds: int
) -> dict[str, Any]:
    """What a larger batch of many speakers costs over the same clips of one."""
    ratios = []
    with Engine(speech, max_batch=len(clips), max_queue=len(clips)) as engine:
        for number in range(rounds + 1):  # the first is for warming up
            many, _ = timed(lambda: together(engine, clips, speakers))
            one, _ = timed(lambda: together(engine, clips, speakers[:1] * len(clips)))
            if number:
                ratios.append(many / one)
    return {
        "speakers": len(clips),
        "rounds": rounds,
        "over one speaker": round(statistics.median(ratios), 2),
        "each round": [round(ratio, 2) for ratio in ratios],
    }


def beside_a_long_one(engine: Engine, clip: Any, long: Any, rounds: int) -> dict[str, Any]:
    """How long a short clip takes alone, and while a long recording is heard."""

    def ask() -> float:
        return timed(lambda: engine.submit(clip, None, PLAIN).future.result())[0]

    ask()
    alone = statistics.median(ask() for _ in range(rounds))
    windows: list[float] = []
    job = engine.submit(
        long, None, TIMED, on_progress=lambda done, seconds: windows.append(time.perf_counter())
    )
    while len(windows) < UNDISTURBED and not job.future.done():
        time.sleep(0.01)
    window = float(statistics.median(np.diff(windows)))
    beside = []
    for number in range(rounds):
        beside.append(ask())
        time.sleep(window * (number % PHASES) / PHASES)  # not always at a window's beginning
    done = job.future.done()
    engine.cancel(job)
    return {
        "minutes": round(len(long) / SAMPLE_RATE / 60, 1),
        "rounds": rounds,
        "heard all the while": not done,
        "seconds alone": round(alone, 3),
        "seconds of a window": round(window, 3),
        "median": round(statistics.median(beside), 3),
        "worst": round(max(beside), 3),
        "alone and two windows": round(alone + 2 * window, 3),
    }


def main(
    data: Annotated[Path, typer.Option(help="A corpus.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    speakers: Annotated[int, typer.Option(min=2)] = 16,
    more: Annotated[int, typer.Option(help="Speakers of a larger batch.")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    minutes: Annotated[float, typer.Option(help="Of the long recording.")] = 30.0,
    requests: Annotated[int, typer.Option(min=100)] = 1000,
    threads: Annotated[int, typer.Option()] = 2,
    only: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; may be repeated.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Where the numbers go.")] = None,
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    parts = only or list(PARTS)
    if not set(parts) <= set(PARTS):
        raise SAMLError(f"--only {', '.join(parts)}: expected some of {', '.join(PARTS)}")
    found: dict[str, Any] = read_json(json) if json is not None and json.is_file() else {}
    device = f"{device_name(torch.device('cpu'))}; {native_status()}; torch {torch.__version__}"

    def noted(name: str, row: dict[str, Any]) -> None:
        found[name] = row | {"model": model, "device": device, "date": time.strftime("%Y-%m-%d")}
        typer.echo(f"{name}: {row}")
        if json is not None:
            write_json(json, found)

    def loaded() -> float:
        """Processes that wanted to run in the last minute: others' load, before a measurement."""
        return round(os.getloadavg()[0], 1)

    if "start" in parts:
        before = loaded()
        noted("start", ready_after(model, rounds) | {"load": before} | added_bytes())
    if set(parts) == {"start"}:
        return
    clips = [u.load() for u in spread(at_once(load_corpus(data)), max(speakers, more))]
    network, features = load_adaptable(model)
    profiles = voices(network, max(speakers, more))
    speech = bind(network, features)
    few = clips[:: max(1, len(clips) // speakers)][:speakers]
    with Engine(speech, max_batch=speakers, max_queue=max(64, speakers)) as engine:
        if "speakers" in parts:
            before = loaded()
            row = at_once_or_in_turn(engine, few, profiles[:speakers], rounds)
            noted("speakers", row | {"load": before})
        if "long" in parts:
            before, whole = loaded(), np.concatenate(clips)
            count = int(minutes * 60 * SAMPLE_RATE)
            long = np.tile(whole, 1 + count // len(whole))[:count]
            row = beside_a_long_one(engine, whole[: 3 * SAMPLE_RATE], long, 3 * rounds)
            noted("long", row | {"load": before})
        if "memory" in parts:
            with tempfile.TemporaryDirectory() as folder:
                store = Path(folder)
                for profile in profiles[:speakers]:
                    profile.save(store / f"{profile.name}.safetensors")
                names = [profile.name for profile in profiles[:speakers]]
                before = loaded()
                short = sorted(clips, key=len)[:speakers]
                row = memory_over_requests(engine, short, names, store, requests)
                noted("memory", row | {"load": before})
    if "more" in parts:
        before = loaded()
        many = (clips * more)[:more]
        noted("more", over_one_speaker(speech, many, profiles, rounds) | {"load": before})


if __name__ == "__main__":
    typer.run(main)
