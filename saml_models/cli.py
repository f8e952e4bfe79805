"""The command `saml`. Bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from saml_models.quiet import quiet_libraries
from saml_models.speaker_commands import Store
from saml_models.terminal import (
    Device,
    Epochs,
    Experts,
    LearningRate,
    Model,
    Overwrite,
    Seed,
    checkpoint_of,
    device_named,
    given,
    print_result,
    print_rows,
    progress,
    resumable,
)

# torch and transformers are imported inside the commands, so that `saml --help` answers at once.
__all__ = ["app", "main"]

FORMATS = ("txt", "json", "srt", "vtt", "tsv", "all")
INTERRUPTED = 130


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
            print(f"saml: {str(stop) or 'interrupted'}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from stop


app = typer.Typer(
    name="saml",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Whisper and Conformer at a seventh of their size, and experts that learn a voice.",
)


@app.command()
def transcribe(
    audio: Annotated[
        list[Path] | None, typer.Argument(help="Audio files, or folders of them.")
    ] = None,
    model: Model = "tiny.en",
    output_format: Annotated[
        str | None, typer.Option("--output_format", help=f"Write files: {', '.join(FORMATS)}.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="Where files go; default: here.")
    ] = None,
    overwrite: Overwrite = False,
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
    speaker: Annotated[
        str | None, typer.Option(help="An enrolled speaker, a profile's file, or auto.")
    ] = None,
    speakers: Annotated[
        Path | None,
        typer.Option(help="CSV of audio,speaker: who is heard where, all in the same batches."),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(help="Pretrained, as for adapt; for gates, those they were made with."),
    ] = None,
    store: Store = None,
    device: Device = None,
) -> None:
    """Speech to text on standard output; files too with --output_format or --output_dir."""
    writes = output_format is not None or output_dir is not None
    output_format, output_dir = output_format or "all", output_dir or Path()
    quiet_libraries()
    from saml_kernels.errors import SAMLError
    from saml_models.audio import load_audio
    from saml_models.loading import load_for_speakers
    from saml_models.speaker_choice import choose_speakers, read_map
    from saml_models.transcription import transcribe_many
    from saml_models.writers import write_transcript

    if output_format not in FORMATS:
        raise SAMLError(f"--output_format {output_format}: expected one of {', '.join(FORMATS)}")
    if output_dir.exists() and not output_dir.is_dir():
        raise SAMLError(f"{output_dir}: is a file; expected a folder to write to")
    if speaker is not None and speakers is not None:
        raise SAMLError("--speaker and --speakers: give one of them")
    listed = read_map(speakers) if speakers is not None else None
    if not audio and listed is None:
        raise SAMLError("nothing to transcribe: give audio files, or a list with --speakers")
    files = _recordings(audio) if audio else list(listed or {})
    if writes:
        _check_stems(files)
        _check_outputs(files, output_dir, output_format, overwrite)
    heard_as = choose_speakers(files, speaker, listed, store)
    # A damaged file is reported now, not after the hours that the ones before it take.
    with progress("reading") as show:
        for number, file in enumerate(files, start=1):
            load_audio(file)
            show(number, len(files))
    network, processor = load_for_speakers(
        model, heard_as.profiles, device_named(device), perhaps=heard_as.enrolled, experts=experts
    )
    chosen = heard_as.for_files(network, processor, files)
    timed = word_timestamps or (writes and output_format != "txt")
    with progress("transcribing") as show:

        def on_progress(number: int, done: float, seconds: float) -> None:
            if len(files) == 1:
                show(done, seconds)
            else:
                show(number + done / max(seconds, 1e-9), len(files), files[number].name)

        found = transcribe_many(
            network,
            processor,
            files,
            chosen,
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
def pretrain(
    data: Annotated[
        list[Path], typer.Option(help="Speech of many speakers with its text; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="The experts to write (safetensors).")],
    model: Model = "tiny.en",
    exclude_speakers: Annotated[
        str, typer.Option(help="Comma-separated: kept for adaptation and tests.")
    ] = "",
    num_experts: Annotated[int, typer.Option(min=1, help="1 is a single LoRA.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Of one expert.")] = 4,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Train fresh experts and routers on many speakers: what adaptation starts from."""
    quiet_libraries()
    from saml_kernels import SAMLConfig
    from saml_models.corpora import load_corpus
    from saml_models.files import check_output
    from saml_models.loading import load_model
    from saml_models.pretraining import PRETRAINING
    from saml_models.pretraining import pretrain as learn
    from saml_models.speakers import is_profile
    from saml_models.surgery import apply_saml

    check_output(out, is_profile, overwrite)
    kept_out = {name.strip() for name in exclude_speakers.split(",")}
    found = [utterance for path in data for utterance in load_corpus(path)]
    utterances = [utterance for utterance in found if utterance.speaker not in kept_out]
    options = replace(PRETRAINING, **given(epochs, learning_rate, seed))
    network, processor = load_model(model, device_named(device))
    original, _ = load_model(model, device_named(device))
    typer.echo(apply_saml(network, SAMLConfig(num_experts=num_experts, rank=rank)))
    checkpoint = checkpoint_of(out)
    with resumable(checkpoint), progress("pretraining") as show:
        profile = learn(
            network,
            processor,
            utterances,
            options,
            checkpoint=checkpoint,
            on_step=lambda done, steps, loss: show(done, steps, f"loss {loss:.3f}"),
            original=original,
        )
        profile.save(out)
    about = profile.about
    typer.echo(
        f"learnt from {about['speakers']} speakers, {about['utterances']} utterances "
        f"({about['seconds'] / 3600:.2f} h of speech)"
    )
    print_result(network, profile, out)
    typer.echo(f"use it: saml adapt --model {model} --experts {out} ...")


@app.command()
def quantize(
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A new folder.")],
    model: Model = "tiny.en",
    experts: Experts = None,
) -> None:
    """Write a low-bit model with its experts as a folder that --model takes."""
    quiet_libraries()
    from saml_models.files import atomic_folder, check_new_folder
    from saml_models.loading import load_model, make_adaptable
    from saml_models.storage import save_saml

    check_new_folder(out)
    network, processor = load_model(model)
    report = make_adaptable(network, model, experts=experts)
    with atomic_folder(out) as temporary:
        stored = save_saml(network, processor, temporary)
    typer.echo(report)
    typer.echo(
        f"{out}: {stored / 1e6:.2f} MB on disk with everything, {report.full_bytes / stored:.2f}x "
        f"smaller than {report.full_bytes / 1e6:.1f} MB in float32"
    )


@app.command()
def doctor() -> None:
    """What this machine has, and which backends it will use."""
    quiet_libraries()
    from saml_models.doctor import report

    print_rows(report())


def main() -> None:
    """Run `saml`; the console script's entry point."""
    app()


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _recordings(paths: list[Path]) -> list[Path]:
    """Files as given, and the audio files below folders, sorted."""
    from saml_models.audio import audio_files

    return [file for path in paths for file in (audio_files(path) if path.is_dir() else [path])]


def _check_stems(files: list[Path]) -> None:
    """Outputs are named after the input without its suffix: two must not share one."""
    from saml_kernels.errors import SAMLError

    seen: dict[str, Path] = {}
    for file in files:
        twin = seen.setdefault(file.stem, file)
        if twin is not file:
            raise SAMLError(f"{twin}, {file}: would be written to the same name; run them apart")


def _check_outputs(files: list[Path], folder: Path, format: str, overwrite: bool) -> None:
    """A person may have corrected a transcript: none is replaced unasked, whoever wrote it."""
    from saml_models.files import check_output

    kinds = FORMATS[:-1] if format == "all" else (format,)
    for file in files:
        for kind in kinds:
            check_output(folder / f"{file.stem}.{kind}", overwrite=overwrite)


from saml_models import (  # noqa: E402 - they register on the finished app
    adapt_command,
    benchmark,
    protocol,
    speaker_commands,
)

adapt_command.add_commands(app)
speaker_commands.add_commands(app)
protocol.add_commands(app)
benchmark.add_commands(app)
