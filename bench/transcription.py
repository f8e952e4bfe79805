"""Transcribes the same real speech with this package and its peers: time, memory, WER.

    python bench/transcription.py --data ../shared/data/LibriSpeech/test-other [--model tiny.en]
        [--clips 30] [--rounds 3] [--threads 2] [--json bench/results/transcription-tiny.en.json]

Contenders, each in a process of its own, in turn within each round (A B C A B C ...):

* saml: the quantised model with experts from a folder that `saml quantize` made, greedy;
* faster-whisper int8: CTranslate2 on the same weights, greedy (beam_size=1), and its default, 5;
* openai-whisper: float32, greedy, where it is installed and has the weights;
* transformers float32: `generate`, greedy, one clip after the other.

Every one hears each clip by itself, without times, and says how long the transcription alone took
(the model is loaded and warm) and the peak resident memory of its process, imports included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from saml_models.corpora import load_corpus
from saml_models.scoring import pooled, word_errors

Texts = Callable[[list[np.ndarray]], list[str]]


def quantise(model: str, folder: Path) -> None:
    """What an edge device is given: the quantised model with its experts, in one folder."""
    from saml_models.loading import load_adaptable
    from saml_models.storage import save_saml

    network, processor = load_adaptable(model)
    network.saml_short_windows = True  # as after any training of experts
    save_saml(network, processor, folder)


def saml(model: str, threads: int, folder: Path) -> Texts:
    import torch

    from saml_models.loading import load_model
    from saml_models.transcription import transcribe_many

    torch.set_num_threads(threads)
    network, processor = load_model(folder)
    return lambda clips: [
        t.text for t in transcribe_many(network, processor, clips, timestamps=False)
    ]


def transformers(model: str, threads: int, folder: Path) -> Texts:
    import torch

    from saml_models.loading import load_model

    torch.set_num_threads(threads)
    network, processor = load_model(model)

    @torch.inference_mode()
    def run(clips: list[np.ndarray]) -> list[str]:
        found = []
        for clip in clips:
            features = processor(clip, sampling_rate=16000, return_tensors="pt").input_features
            tokens = network.generate(features, max_new_tokens=200)
            found += processor.batch_decode(tokens, skip_special_tokens=True)
        return found

    return run


def faster_whisper(model: str, threads: int, beam_size: int) -> Texts:
    from faster_whisper import WhisperModel

    from saml_models.offline import find_model

    folder = Path(tempfile.mkdtemp())
    installed = find_model(model)
    if installed is None:
        raise SystemExit(f"{model}: its weights are not installed")
    with open(folder / "model.bin", "wb") as joined:
        for part in installed.weights:
            joined.write(part.read_bytes())
    (folder / "config.json").write_bytes(installed.config.read_bytes())
    for file in (installed.tokenizer, *installed.tokenizer.parent.glob("vocabulary.*")):
        (folder / file.name).write_bytes(file.read_bytes())
    network = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=threads)

    def run(clips: list[np.ndarray]) -> list[str]:
        found = []
        for clip in clips:
            segments, _ = network.transcribe(
                clip, language="en", beam_size=beam_size, without_timestamps=True,
                condition_on_previous_text=False, temperature=0.0,
            )  # fmt: skip
            found.append("".join(s.text for s in segments).strip())
        return found

    return run


def openai_whisper(model: str, threads: int, folder: Path) -> Texts:
    import torch
    import whisper

    torch.set_num_threads(threads)
    network = whisper.load_model(model)
    options = {"language": "en", "fp16": False, "without_timestamps": True, "temperature": 0.0}
    return lambda clips: [network.transcribe(c, **options)["text"].strip() for c in clips]


CONTENDERS: dict[str, Callable[[str, int, Path], Texts]] = {
    "saml": saml,
    "faster-whisper int8": lambda m, t, _: faster_whisper(m, t, 1),
    "faster-whisper int8, beam 5": lambda m, t, _: faster_whisper(m, t, 5),
    "openai-whisper": openai_whisper,
    "transformers float32": transformers,
}


def worker(name: str, model: str, clips: Path, threads: int) -> None:
    """Load, warm up on two clips, time all of them; one line of JSON."""
    with np.load(clips) as stored:
        audio = [stored[str(i)] for i in range(len(stored))]
    run = CONTENDERS[name](model, threads, clips.with_name("quantised"))
    run(audio[:2])
    started = time.perf_counter()
    texts = run(audio)
    seconds = time.perf_counter() - started
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    memory = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({"seconds": seconds, "megabytes": memory, "texts": texts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="tiny.en")
    parser.add_argument("--clips", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--audio", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        worker(o.worker, o.model, o.audio, o.threads)
        return
    utterances = [u for u in load_corpus(o.data) if len(u.load()) <= 30 * 16000]
    utterances = utterances[:: max(1, len(utterances) // o.clips)][: o.clips]
    audio = sum(len(u.load()) for u in utterances) / 16000
    rounds: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips.npz"
        np.savez(clips, **{str(i): u.load() for i, u in enumerate(utterances)})
        quantise(o.model, clips.with_name("quantised"))
        for turn in range(o.rounds):
            for name in CONTENDERS:
                if name in skipped:
                    continue
                call = [sys.executable, __file__, "--worker", name, "--model", o.model]
                call += ["--audio", str(clips), "--threads", str(o.threads)]
                done = subprocess.run(call, capture_output=True, text=True)
                if done.returncode:
                    skipped[name] = (done.stderr.strip().splitlines() or ["failed"])[-1]
                    continue
                rounds.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {turn + 1}: {name} {rounds[name][-1]['seconds']:.1f} s", flush=True)
    table = Table(title=f"{o.model}, {len(utterances)} clips, {audio:.0f} s of speech")
    for column in ("", "seconds", "real-time factor", "peak MB", "WER %"):
        table.add_column(column, justify="right")
    results = {}
    for name, found in rounds.items():
        seconds = statistics.median(r["seconds"] for r in found)
        wer = float(pooled(word_errors([u.text for u in utterances], found[-1]["texts"])).wer)
        results[name] = {
            "seconds": round(seconds, 2), "real_time_factor": round(seconds / audio, 4),
            "megabytes": round(max(r["megabytes"] for r in found)), "wer": round(wer, 2),
        }  # fmt: skip
        table.add_row(name, *(str(v) for v in results[name].values()))
    Console().print(table)
    for name, why in skipped.items():
        print(f"{name}: not run: {why}")
    if o.json:
        about = {"model": o.model, "clips": len(utterances), "audio_seconds": round(audio, 1)}
        about |= {"threads": o.threads, "rounds": o.rounds}
        o.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
        print(f"written: {o.json}")


if __name__ == "__main__":
    main()
