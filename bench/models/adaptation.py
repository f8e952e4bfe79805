"""P8: time to adapt to one speaker, and what it gains.

    python -m bench adaptation --data LibriSpeech/train-clean-5

Twenty utterances are learnt and the speaker's others are tested.

saml is `saml adapt` as released (its shipped experts, its own defaults). The others train the same
targets for as many passes, four clips at a time, in windows of 30 s as transformers asks for, with
AdamW and no augmentation. The clock runs while a model learns, not while it is loaded or tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.models.adapters import ADAPTERS, Trainer
from bench.models.turns import answer, forget_peak, in_turn, record, stopwatch
from bench.place import RESULTS
from saml_models.compress.loading import load_model
from saml_models.data.corpora import Utterance, load_corpus
from saml_models.models.registry import bind
from saml_models.speakers.pretrained import load_adaptable
from saml_models.text.wer import pooled, word_errors
from saml_models.training.adapt import ADAPTATION, adapt
from saml_models.training.samples import training_samples
from saml_models.transcription.recordings import transcribe_many

BATCH = 4


def learn_saml(model: str, train: list[Utterance], device: torch.device) -> tuple[float, Any, Any]:
    network, processor = load_adaptable(model, device=device)
    forget_peak(device)
    seconds, profile = stopwatch(lambda: adapt(network, processor, train, guard=False), device)
    profile.apply(network)
    network.saml.short_windows = True
    return seconds, network, processor


def learn(
    name: str, model: str, train: list[Utterance], device: torch.device
) -> tuple[float, Any, Any]:
    network, processor = load_model(model, device)
    samples = training_samples(bind(network, processor), train)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    trainer = Trainer(ADAPTERS[name](network, dtype).train(), device)

    def batch(part: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        clips = [s.load() for s in part]
        heard = processor(clips, sampling_rate=16000, return_tensors="pt").input_features
        padded = processor.tokenizer([s.text for s in part], padding=True, return_tensors="pt")
        labels = padded.input_ids.masked_fill(padded.attention_mask == 0, -100)
        return heard.to(device), labels[:, 1:].to(device)  # the model adds the first token itself

    def run() -> None:
        for _ in range(ADAPTATION.epochs):
            for i in range(0, len(samples), BATCH):
                trainer.step(*batch(samples[i : i + BATCH]))

    forget_peak(device)
    seconds, _ = stopwatch(run, device)
    return seconds, network.eval(), processor


def main(
    data: Annotated[Path, typer.Option(help="A corpus.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
    speaker: Annotated[str, typer.Option()] = "163",
    utterances: Annotated[int, typer.Option(help="To adapt to; the others are tested.")] = 20,
    rounds: Annotated[int, typer.Option()] = 1,
    threads: Annotated[int, typer.Option()] = 2,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    only: Annotated[str, typer.Option(help="By semicolons.")] = ";".join(ADAPTERS),
    results: Annotated[Path, typer.Option(help="Folder.")] = RESULTS,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    where = torch.device(device)
    torch.set_num_threads(threads)
    if worker is None:
        options = ["--data", data, "--model", model, "--speaker", speaker, "--threads", threads]
        options += ["--utterances", utterances, "--device", device]
        found = in_turn("bench.models.adaptation", only.split(";"), options, rounds)
        title = f"adapting Whisper {model} to {utterances} utterances of speaker {speaker}"
        record("P8", title, found, results, where, threads)
        return
    clips = load_corpus(data, [speaker])
    train, test = clips[:utterances], clips[utterances:]
    torch.manual_seed(0)
    run = (
        learn_saml(model, train, where) if worker == "saml" else learn(worker, model, train, where)
    )
    seconds, network, processor = run
    audio = [u.load() for u in test]
    heard = [t.text for t in transcribe_many(network, processor, audio, timestamps=False)]
    wer = float(pooled(word_errors([u.text for u in test], heard)).wer)
    answer(where, seconds, wer=round(wer, 2))


if __name__ == "__main__":
    typer.run(main)
