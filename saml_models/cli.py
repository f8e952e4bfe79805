"""The command `saml`. Bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from saml_models.quiet import quiet_libraries

# torch and transformers are imported inside the commands, so that `saml --help` answers at once.
if TYPE_CHECKING:
    from saml_models.training import TrainingOptions

__all__ = ["app", "main"]

FORMATS = ("txt", "json", "srt", "vtt", "tsv", "all")
INTERRUPTED = 130


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what the user has to know as its message."""


class _Commands(TyperGroup):
    """All commands fail in the same way."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; bad input, a full disk and Ctrl-C become one line each."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            from saml_kernels.errors import SAMLError

            if not isinstance(error, SAMLError | OSError):
                raise
            print(f"saml: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as stop:
            print(f"saml: {str(stop) or 'interrupted; nothing was written'}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from stop


app = typer.Typer(
    name="saml",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Whisper at a seventh of its size, and experts that learn a voice.",
)
speakers = typer.Typer(no_args_is_help=True, help="Look into speaker profiles.")
app.add_typer(speakers, name="speakers")

Model = Annotated[
    str,
    typer.Option(
        help="openai-whisper's name (tiny.en, base, ...), a Hugging Face id, or a folder in "
        "Hugging Face, CTranslate2 or `saml quantize` layout."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda if there is.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the utterances.")]
LearningRate = Annotated[float | None, typer.Option(min=1e-9, help="AdamW's peak.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of everything random.")]


@app.command()
def transcribe(
    audio: Annotated[list[Path], typer.Argument(help="Audio files, or folders of them.")],
    model: Model = "tiny.en",
    output_format: Annotated[
        str | None, typer.Option("--output_format", help=f"Write files: {', '.join(FORMATS)}.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="Where files go; default: here.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Code or name; default: detected, where there are several.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="transcribe, or translate into English.")
    ] = "transcribe",
    beam_size: Annotated[int, typer.Option("--beam_size", min=1, help="1 is greedy.")] = 1,
    word_timestamps: Annotated[
        bool, typer.Option("--word_timestamps", help="Also find when each word was said.")
    ] = False,
    speaker: Annotated[Path | None, typer.Option(help="A profile that `saml adapt` made.")] = None,
    device: Device = None,
) -> None:
    """Speech to text on standard output; files too with --output_format or --output_dir."""
    writes = output_format is not None or output_dir is not None
    output_format, output_dir = output_format or "all", output_dir or Path()
    quiet_libraries()
    from saml_kernels.errors import SAMLError
    from saml_models.audio import load_audio
    from saml_models.loading import load_adaptable, load_model, profile_config
    from saml_models.speakers import SpeakerProfile
    from saml_models.transcription import transcribe_many
    from saml_models.writers import write_transcript

    if output_format not in FORMATS:
        raise SAMLError(f"--output_format {output_format}: expected one of {', '.join(FORMATS)}")
    if output_dir.exists() and not output_dir.is_dir():
        raise SAMLError(f"{output_dir}: is a file; expected a folder to write to")
    files = _recordings(audio)
    if writes:
        _check_stems(files)
    profile = SpeakerProfile.load(speaker) if speaker else None
    # A damaged file is reported now, not after the hours that the ones before it take.
    with _progress("reading") as show:
        for number, file in enumerate(files, start=1):
            load_audio(file)
            show(number, len(files))
    if profile is None:
        network, processor = load_model(model, _device(device))
    else:
        config = profile_config(profile)
        network, processor = load_adaptable(model, config, speaker, _device(device))
    timed = word_timestamps or (writes and output_format != "txt")
    with _progress("transcribing") as show:

        def on_progress(number: int, done: float, seconds: float) -> None:
            if len(files) == 1:
                show(done, seconds)
            else:
                show(number + done / max(seconds, 1e-9), len(files), files[number].name)

        found = transcribe_many(
            network,
            processor,
            files,
            profile,
            language=language,
            task=task,
            beam_size=beam_size,
            word_timestamps=word_timestamps,
            timestamps=timed,
            on_progress=on_progress,
        )
        for file, heard in zip(files, found, strict=True):
            typer.echo(heard.text if len(files) == 1 else f"{file}\t{heard.text}")
            if writes:
                write_transcript(heard, output_dir, file.stem, output_format)


@app.command()
def adapt(
    data: Annotated[Path, typer.Option(help="Speech with its text: a corpus, manifest or folder.")],
    out: Annotated[Path, typer.Option(help="The profile to write (safetensors).")],
    model: Model = "tiny.en",
    speaker: Annotated[
        str | None, typer.Option(help="Whose voice; not needed where the data has one speaker.")
    ] = None,
    adapt_utterances: Annotated[
        int | None, typer.Option(min=1, help="Use the speaker's first K utterances; default: all.")
    ] = None,
    experts: Annotated[
        Path | None, typer.Option(help="Pretrained experts to start from; default: those shipped.")
    ] = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Learn one speaker's voice; a killed run resumes when it is started again."""
    quiet_libraries()
    from saml_kernels.errors import SAMLError
    from saml_models.adaptation import ADAPTATION
    from saml_models.adaptation import adapt as learn
    from saml_models.corpora import by_speaker, load_corpus
    from saml_models.loading import load_adaptable

    _check_file(out)
    utterances = load_corpus(data, [speaker] if speaker else None)
    voices = by_speaker(utterances)
    if len(voices) > 1:
        shown = ", ".join(list(voices)[:8])
        raise SAMLError(f"{data}: has {len(voices)} speakers ({shown}); choose one with --speaker")
    utterances = utterances[:adapt_utterances]
    network, processor = load_adaptable(model, experts=experts, device=_device(device))
    options = _options(ADAPTATION, epochs, learning_rate, seed)
    checkpoint = _checkpoint(out)
    with _resumable(checkpoint), _progress("adapting") as show:
        profile = learn(
            network,
            processor,
            utterances,
            options,
            speaker=speaker,
            checkpoint=checkpoint,
            on_step=lambda done, steps, loss: show(done, steps, f"loss {loss:.3f}"),
        )
    profile.save(out)
    about = profile.about
    typer.echo(
        f"learnt {about['speaker']} from {about['utterances']} utterances "
        f"({about['seconds']:g} s of speech)"
    )
    _print_result(network, profile, out)
    typer.echo(f"try it: saml transcribe --model {model} --speaker {out} FILE")


@app.command()
def pretrain(
    data: Annotated[
        list[Path], typer.Option(help="Speech of many speakers with its text; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="The experts to write (safetensors).")],
    model: Model = "tiny.en",
    exclude_speakers: Annotated[
        str, typer.Option(help="Comma-separated: kept for adaptation and tests.")
    ] = "",
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Train fresh experts and routers on many speakers: what adaptation starts from."""
    quiet_libraries()
    from saml_kernels import SAMLConfig
    from saml_models.corpora import load_corpus
    from saml_models.loading import load_model
    from saml_models.pretraining import PRETRAINING
    from saml_models.pretraining import pretrain as learn
    from saml_models.surgery import apply_saml

    _check_file(out)
    kept_out = {name.strip() for name in exclude_speakers.split(",")}
    found = [utterance for path in data for utterance in load_corpus(path)]
    utterances = [utterance for utterance in found if utterance.speaker not in kept_out]
    options = _options(PRETRAINING, epochs, learning_rate, seed)
    network, processor = load_model(model, _device(device))
    teacher = load_model(model, _device(device))[0] if options.distil > 0 else None
    typer.echo(apply_saml(network, SAMLConfig()))
    checkpoint = _checkpoint(out)
    with _resumable(checkpoint), _progress("pretraining") as show:
        profile = learn(
            network,
            processor,
            utterances,
            options,
            checkpoint=checkpoint,
            on_step=lambda done, steps, loss: show(done, steps, f"loss {loss:.3f}"),
            teacher=teacher,
        )
    profile.save(out)
    about = profile.about
    typer.echo(
        f"learnt from {about['speakers']} speakers, {about['utterances']} utterances "
        f"({about['seconds'] / 3600:.2f} h of speech)"
    )
    _print_result(network, profile, out)
    typer.echo(f"use it: saml adapt --model {model} --experts {out} ...")


@app.command()
def quantize(
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A new folder.")],
    model: Model = "tiny.en",
    experts: Annotated[
        Path | None, typer.Option(help="Pretrained experts; default: those shipped.")
    ] = None,
) -> None:
    """Write a low-bit model with its experts as a folder that --model takes."""
    quiet_libraries()
    from saml_kernels.errors import SAMLError
    from saml_models.loading import load_model, make_adaptable
    from saml_models.storage import save_saml

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SAMLError(f"{out}: is there already; remove it or give a new folder")
    network, processor = load_model(model)
    report = make_adaptable(network, model, experts=experts)
    # The folder appears when everything in it is written.
    target = out.resolve()
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        stored = save_saml(network, processor, temporary)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    typer.echo(report)
    typer.echo(
        f"{out}: {stored / 1e6:.2f} MB on disk with everything, {report.full_bytes / stored:.2f}x "
        f"smaller than {report.full_bytes / 1e6:.1f} MB in float32"
    )


@speakers.command("show")
def show_speaker(
    profile: Annotated[Path, typer.Argument(metavar="FILE", help="A speaker profile.")],
) -> None:
    """Print what a profile's header says."""
    from saml_models.speakers import SpeakerProfile

    found = SpeakerProfile.load(profile)
    rows = {
        **found.about,
        "hash": found.hash,
        "bytes": f"{found.nbytes:,}",
        "base weights": found.weight_hash,
        **{f"config.{key}": value for key, value in found.config.items()},
    }
    _print_rows([(key, str(value)) for key, value in rows.items()])


@app.command()
def doctor() -> None:
    """What this machine has, and which backends it will use."""
    quiet_libraries()
    from saml_models.doctor import report

    _print_rows(report())


def main() -> None:
    """Run `saml`; the console script's entry point."""
    app()


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _recordings(paths: list[Path]) -> list[Path]:
    """Files as given, and the audio files below folders, sorted."""
    from saml_kernels.errors import SAMLError
    from saml_models.audio import AUDIO_SUFFIXES

    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = (p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
        found = sorted(p for p in inside if not p.name.startswith("."))
        if not found:
            raise SAMLError(f"{path}: no audio below it; expected {', '.join(AUDIO_SUFFIXES)}")
        files += found
    return files


def _check_stems(files: list[Path]) -> None:
    """Outputs are named after the input without its suffix: two must not share one."""
    from saml_kernels.errors import SAMLError

    seen: dict[str, Path] = {}
    for file in files:
        twin = seen.setdefault(file.stem, file)
        if twin is not file:
            raise SAMLError(f"{twin}, {file}: would be written to the same name; run them apart")


def _check_file(out: Path) -> None:
    from saml_kernels.errors import SAMLError

    if out.is_dir():
        raise SAMLError(f"{out}: is a folder; expected the name of a file to write")


def _checkpoint(out: Path) -> Path:
    return out.with_name(f"{out.name}.checkpoint.safetensors")


@contextmanager
def _resumable(checkpoint: Path) -> Iterator[None]:
    """Ctrl-C says where the work done so far is."""
    try:
        yield
    except KeyboardInterrupt:
        if not checkpoint.exists():
            raise
        raise _Interrupted(
            f"interrupted; {checkpoint} holds the progress: run the same command to go on"
        ) from None


def _options(
    defaults: TrainingOptions, epochs: int | None, learning_rate: float | None, seed: int | None
) -> TrainingOptions:
    given = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return replace(defaults, **changes)


@contextmanager
def _progress(label: str) -> Iterator[Callable[..., None]]:
    """A bar on standard error, where that is a terminal: yields show(done, total, note)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=None, note="")

        def show(done: float, total: float, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield show


def _print_result(network: Any, profile: Any, out: Path) -> None:
    from saml_models.surgery import expert_parameters

    trainable = sum(p.numel() for p in expert_parameters(network).values())
    typer.echo(f"trainable parameters: {trainable:,}; the base is frozen")
    typer.echo(f"written: {out} ({out.stat().st_size:,} bytes, hash {profile.hash[:16]})")


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


from saml_models import benchmark, protocol  # noqa: E402 - they register on the finished app

protocol.add_commands(app)
benchmark.add_commands(app)
