"""Memory and CPU time of calibrating a Whisper of some size.

    python -m bench rounding-memory --data DATA --size small

Weights are random, as those of small come with no package: memory depends on sizes alone. Speech,
its text and how much there is of it are those that ship's rounding was made with; each clip comes
twice where a real calibration has a copy in noise. Prints the most memory that the process had, its
CPU seconds and the threads.
"""

from __future__ import annotations

import copy
import resource
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from transformers import WhisperForConditionalGeneration

from bench.accuracy.speech import training_speech
from saml_kernels.errors import SAMLError
from saml_models.compress.calibrate import calibrate
from saml_models.compress.calibration_speech import CalibrationClip, choose_utterances
from saml_models.compress.loading import load_model
from saml_models.data.audio import MAX_SECONDS, SAMPLE_RATE
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries

SIZES = {"tiny": (384, 4), "base": (512, 6), "small": (768, 12), "medium": (1024, 24)}  # d, layers


def main(
    data: Annotated[Path, typer.Option(help="Holds LibriSpeech/, speechocean762/ and so on.")],
    size: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}.")] = "small",
) -> None:
    quiet_libraries()
    if size not in SIZES:
        raise SAMLError(f"--size {size}: expected one of {', '.join(SIZES)}")
    base, processor = load_model("base")
    config, (width, layers) = copy.deepcopy(base.config), SIZES[size]
    config.update({"d_model": width, "num_hidden_layers": layers})
    for half in ("encoder", "decoder"):
        config.update({
            f"{half}_layers": layers,
            f"{half}_attention_heads": width // 64,
            f"{half}_ffn_dim": 4 * width,
        })  # fmt: skip
    del base
    torch.manual_seed(0)
    speech = bind(WhisperForConditionalGeneration(config).eval(), processor)
    clips = []
    for utterance in choose_utterances(training_speech(data)):
        samples = utterance.load()
        if len(samples) <= MAX_SECONDS * SAMPLE_RATE:
            tokens, prompt = speech.token_ids(utterance.text.lower(), "en")
            clips += [CalibrationClip(samples, tuple(tokens), prompt)] * 2
    console, started = Console(), time.process_time()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as show:
        task = show.add_task(f"{size}: calibrating")
        calibrate(speech, clips, on_progress=lambda done, total, _: show.update(
            task, completed=done, total=total
        ))  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = sum(len(clip.samples) for clip in clips) / SAMPLE_RATE
    console.print(
        f"{size}: {sum(p.numel() for p in speech.network.parameters()) / 1e6:.0f} M parameters, "
        f"{len(clips)} clips, {seconds:.0f} s: at most {peak / 1e9:.2f} GB, "
        f"{time.process_time() - started:.0f} CPU s, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    typer.run(main)
