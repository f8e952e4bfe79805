"""Transcription while another program keeps one core busy.

    python -m bench busy-core --data LibriSpeech/test-other --json bench/results/busy-core.json

The quantised model with its experts, loaded and warm, hears the same clips alone and beside a loop
pinned to the last core, in turn; a ratio is the median over the rounds. The loop runs in a session
of its own, as another person's program would, and begins together with the clips. `--fixed` keeps
the number of threads as it is, which is what happens without `runtime/threads.py`: give it one
round and few clips. The quiet half means something on a quiet machine only; the share of the cores
that others took meanwhile is printed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.models.clips import at_once, spread
from saml_kernels.files import write_json
from saml_models.data.corpora import load_corpus
from saml_models.models.registry import bind
from saml_models.runtime import threads as runtime_threads
from saml_models.speakers.pretrained import load_adaptable
from saml_models.transcription.clips import decode_clips

# It ends with the process that started it, however that one ends.
LOOP = """
import os
os.sched_setaffinity(0, {%d})
print("busy", flush=True)
while os.getppid() == %d:
    for _ in range(1000000):
        pass
"""


@contextmanager
def busy_core() -> Iterator[None]:
    """Within the block the last core that this process may use is kept busy."""
    last = max(os.sched_getaffinity(0))
    call = [sys.executable, "-c", LOOP % (last, os.getpid())]
    with subprocess.Popen(call, start_new_session=True, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()  # it is
        try:
            yield
        finally:
            other.kill()


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Of one run, and the cores that others took meanwhile."""
    before = runtime_threads.sample()
    started = time.perf_counter()
    run()
    took = time.perf_counter() - started
    after = runtime_threads.sample()
    others = runtime_threads.others(before, after) if before and after else float("nan")
    return took, round(others, 2)


def main(
    data: Annotated[Path, typer.Option(help="A corpus.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    clips: Annotated[int, typer.Option()] = 6,
    rounds: Annotated[int, typer.Option()] = 5,
    threads: Annotated[int, typer.Option()] = 2,
    fixed: Annotated[bool, typer.Option(help="As many threads, whatever others do.")] = False,
    json: Annotated[Path | None, typer.Option(help="Where the numbers go.")] = None,
) -> None:
    torch.set_num_threads(threads)
    if fixed:
        runtime_threads.SPARED = float("inf")
    network, processor = load_adaptable(model)
    audio = [u.load() for u in spread(at_once(load_corpus(data)), clips)]

    def run() -> object:
        return decode_clips(bind(network, processor), audio, batch_size=8)

    run()
    quiet, busy = [], []
    for _ in range(rounds):
        quiet.append(seconds(run))
        with busy_core():
            busy.append(seconds(run))
    ratio = statistics.median(b[0] / q[0] for q, b in zip(quiet, busy, strict=True))
    found = {
        "model": model, "threads": threads, "fixed": fixed, "clips": len(audio), "rounds": rounds,
        "quiet_seconds": round(statistics.median(q[0] for q in quiet), 3),
        "busy_seconds": round(statistics.median(b[0] for b in busy), 3),
        "ratio": round(ratio, 2),
        "others_took_cores": {
            "quiet": statistics.median(q[1] for q in quiet),
            "busy": statistics.median(b[1] for b in busy),
        },
    }  # fmt: skip
    for name, value in found.items():
        print(f"{name}: {value}")
    if json:
        write_json(json, found)
