"""The command `saml transcribe`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from saml_models.cli.options import (
    Device,
    Model,
    Overwrite,
    Store,
    device_named,
)
from saml_models.cli.output import progress
from saml_models.runtime.quiet import quiet_libraries

# As in text/writers.py, which is imported late: it brings torch. A test compares the two.
FORMATS = ("txt", "json", "srt", "vtt", "tsv", "all")


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
        typer.Option(help="CSV of audio,speaker: who speaks where, all in the same batches."),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(help="Pretrained, as for adapt; for gates, those they were made with."),
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option(help="Your own: names and terms, one a line, that are often misheard."),
    ] = None,
    store: Store = None,
    device: Device = None,
) -> None:
    """Speech to text on standard output; files too with --output_format or --output_dir."""
    writes = output_format is not None or output_dir is not None
    output_format, output_dir = output_format or "all", output_dir or Path()
    quiet_libraries()
    from saml_kernels.errors import SAMLError
    from saml_models.data.audio import load_audio
    from saml_models.recogniser import Recogniser
    from saml_models.speakers.choice import choose_speakers, read_map
    from saml_models.text.phrases import read_phrases
    from saml_models.text.writers import write_transcript

    if output_format not in FORMATS:
        raise SAMLError(f"--output_format {output_format}: expected one of {', '.join(FORMATS)}")
    if output_dir.exists() and not output_dir.is_dir():
        raise SAMLError(f"{output_dir}: is a file; expected a folder to write to")
    if speaker is not None and speakers is not None:
        raise SAMLError("--speaker and --speakers: give one of them")
    own_words = None if words is None else read_phrases(words)
    listed = read_map(speakers) if speakers is not None else None
    if not audio and listed is None:
        raise SAMLError("nothing to transcribe: give audio files, or a list with --speakers")
    files = _recordings(audio) if audio else list(listed or {})
    if writes:
        _check_stems(files)
        _check_outputs(files, output_dir, output_format, overwrite)
    heard_as = choose_speakers(files, speaker, listed, store, _note)
    # A damaged file is reported now, not after the hours that the ones before it take.
    with progress("reading") as show:
        for number, file in enumerate(files, start=1):
            load_audio(file)
            show(number, len(files))
    recogniser = Recogniser.for_speakers(
        model,
        heard_as.profiles,
        device_named(device),
        candidates=heard_as.enrolled,
        experts=experts,
    )
    chosen = heard_as.for_files(recogniser.model, recogniser.processor, files)
    timed = word_timestamps or (writes and output_format != "txt")
    with progress("transcribing") as show:

        def on_progress(number: int, done: float, seconds: float) -> None:
            if len(files) == 1:
                show(done, seconds)
            else:
                show(number + done / max(seconds, 1e-9), len(files), files[number].name)

        transcripts = recogniser.transcribe_each(
            files,
            chosen,
            language=language,
            task=task,
            beam_size=beam_size,
            word_timestamps=word_timestamps,
            timestamps=timed,
            own_words=own_words,
            on_progress=on_progress,
        )
        for file, transcript in zip(files, transcripts, strict=True):
            typer.echo(transcript.text if len(files) == 1 else f"{file}\t{transcript.text}")
            if writes:
                write_transcript(transcript, output_dir, file.stem, output_format)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _recordings(paths: list[Path]) -> list[Path]:
    """Files as given, and the audio files below folders, sorted."""
    from saml_models.data.audio import audio_files

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
    from saml_kernels.files import check_output

    kinds = FORMATS[:-1] if format == "all" else (format,)
    for file in files:
        for kind in kinds:
            check_output(folder / f"{file.stem}.{kind}", overwrite=overwrite)
