"""Corpora of transcribed speech: four layouts, one kind of utterance.

| layout | what it looks like | speaker |
|---|---|---|
| LibriSpeech | `<subset>/<speaker>/<chapter>/<id>.flac`, `*.trans.txt` | the folder's number |
| TED-LIUM 3 | `legacy/<split>/{sph,stm}/<talk>.{sph,stm}` | the STM line's third field |
| manifest | JSON lines: `audio`, `text`, `speaker`, optional `id start end duration` | as written |
| clips | `clip.wav` (or another format) beside `clip.txt` | the folder's name |
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from saml_kernels.errors import SAMLError
from saml_models.data.audio import (
    AUDIO_SUFFIXES,
    MAX_SAMPLES,
    SAMPLE_RATE,
    load_audio,
    samples_of,
    warn_of_others,
)
from saml_models.data.tedlium import parse_stm

__all__ = ["Utterance", "by_speaker", "load_corpora", "load_corpus", "short_clips"]

_LAYOUTS = (
    "a LibriSpeech folder, a TED-LIUM 3 folder, a .jsonl manifest or a folder of clip.wav + "
    "clip.txt"
)
_SHOWN = 8

Faults = dict[str, str]  # by speaker, one line


SOMEBODY = "me"  # whose clips are that say no name


@dataclass(frozen=True)
class Utterance:
    """A piece of speech and what was said.

    `start` and `end` cut it out of a longer recording; `duration` is its length where the corpus
    says so. All three in seconds. `samples`, float32 at 16 kHz, stand in for the file where it is
    in memory already.
    """

    id: str
    speaker: str
    text: str
    audio: Path
    start: float | None = None
    end: float | None = None
    duration: float | None = None
    samples: npt.NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    def load(self) -> npt.NDArray[np.float32]:
        """The speech, float32 [samples], mono 16 kHz; read from a file as `load_audio` does."""
        if self.samples is not None:
            return self.samples
        return load_audio(self.audio, self.start, self.end)


def load_corpus(
    path: str | os.PathLike[str],
    speakers: Sequence[str] | None = None,
    *,
    need_text: bool = True,
    need_audio: bool = True,
    faults: Faults | None = None,
) -> list[Utterance]:
    """Read a corpus, whatever its layout; the audio itself stays unread.

    Args:
        path: a LibriSpeech root, subset or speaker; a TED-LIUM 3 release, its `legacy` folder or
            one split; a JSON-lines manifest, whose audio is relative to it; or a folder (or a
            folder of one folder a speaker) with a text file beside each clip.
        speakers: keep only these.
        need_text: else a clip or a manifest's row without text is one whose text is "", and a file
            of audio is one recording.
        need_audio: else a manifest's audio that is not on disk is found out when it is loaded.
        faults: what is wrong with an utterance is put here instead of being raised, the first for
            each speaker, who is left out; what cannot be told to be anybody's, by its place.

    Returns:
        The utterances in file order: a manifest's by row, every other layout's by path and time.

    Raises:
        SAMLError: no such path, no known layout, text without audio or audio without text, a bad
            row (with its file and line), an id used twice, or a speaker who is not there.
    """
    path = Path(path)
    utterances = list(_read(path, need_text, need_audio, faults))
    if not utterances and not faults:
        raise SAMLError(f"{path}: holds no utterance; expected transcribed speech")
    _check_ids(utterances, path, faults)
    if faults:
        utterances = [u for u in utterances if u.speaker not in faults]
    return utterances if speakers is None else _select(utterances, speakers, path)


def load_corpora(
    paths: Sequence[str | os.PathLike[str]], excluded: Collection[str] = ()
) -> list[Utterance]:
    """Several corpora with text, one after the other.

    Args:
        paths: each as for `load_corpus`.
        excluded: speakers who are left out.

    Raises:
        SAMLError: as `load_corpus`, an id that two corpora use, or nobody has an excluded name.
    """
    utterances: list[Utterance] = []
    for path in paths:
        utterances += load_corpus(path)
        _check_ids(utterances, Path(path), None)
    unknown = sorted(set(excluded).difference(u.speaker for u in utterances))
    if unknown:
        raise SAMLError(f"speakers to leave out: nobody is called {', '.join(unknown)}")
    return [u for u in utterances if u.speaker not in excluded]


def _check_ids(utterances: Sequence[Utterance], path: Path, faults: Faults | None) -> None:
    seen: dict[str, Utterance] = {}
    for utterance in utterances:
        twin = seen.setdefault(utterance.id, utterance)
        if twin is not utterance:
            error = SAMLError(
                f"{path}: utterance id {utterance.id!r} is used twice "
                f"({twin.audio}, {utterance.audio}); ids have to differ"
            )
            _note(faults, utterance.speaker, error)


def _note(faults: Faults | None, owner: str, error: SAMLError) -> None:
    """Raise, or keep for whom it concerns."""
    if faults is None:
        raise error
    faults.setdefault(owner, str(error))


def by_speaker(utterances: Sequence[Utterance]) -> dict[str, list[Utterance]]:
    """Group by speaker, both in the order given."""
    groups: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        groups.setdefault(utterance.speaker, []).append(utterance)
    return groups


def short_clips(utterances: Sequence[Utterance]) -> list[npt.NDArray[np.float32]]:
    """The speech of utterances that are heard in one window.

    Raises:
        SAMLError: one is longer than 30 s, or as `Utterance.load`.
    """
    clips = [utterance.load() for utterance in utterances]
    for utterance, clip in zip(utterances, clips, strict=True):
        if len(clip) > MAX_SAMPLES:
            seconds = len(clip) / SAMPLE_RATE
            raise SAMLError(f"{utterance.id}: {seconds:.1f} s long; cut it to 30 s at most")
    return clips


def _select(utterances: list[Utterance], speakers: Sequence[str], path: Path) -> list[Utterance]:
    wanted = set(speakers)
    known = list(by_speaker(utterances))
    unknown = sorted(wanted.difference(known))
    if unknown:
        shown = ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
        raise SAMLError(
            f"{path}: no speaker {', '.join(unknown)}; it has {len(known)} speakers: {shown}"
        )
    return [utterance for utterance in utterances if utterance.speaker in wanted]


def _read(
    path: Path, need_text: bool, need_audio: bool, faults: Faults | None
) -> Iterator[Utterance]:
    """Find out the layout and read it."""
    if path.is_file():
        if not need_text and path.suffix.lower() in AUDIO_SUFFIXES:
            return iter([Utterance(path.stem, SOMEBODY, "", path)])
        if path.suffix.lower() not in (".jsonl", ".json"):
            raise SAMLError(f"{path}: not a corpus; expected {_LAYOUTS}")
        return _read_manifest(path, need_text, need_audio, faults)
    if not path.is_dir():
        raise SAMLError(f"{path}: no such file or folder; expected {_LAYOUTS}")
    if splits := _tedlium_splits(path):
        return (utterance for split in splits for utterance in _read_tedlium(split, faults))
    if transcripts := _librispeech_transcripts(path):
        return _read_librispeech(transcripts, faults)
    if folders := [folder for folder in (path, *_folders(path)) if _clips(folder)]:
        return (u for folder in folders for u in _read_clips(folder, need_text, faults))
    manifests = ", ".join(str(manifest) for manifest in sorted(path.glob("*.jsonl")))
    hint = f"; give one of its manifests: {manifests}" if manifests else ""
    raise SAMLError(f"{path}: no transcribed speech found{hint or f'; expected {_LAYOUTS}'}")


# LibriSpeech


def _librispeech_transcripts(path: Path) -> list[Path]:
    """Transcripts below a chapter, a speaker, a subset or the corpus, whichever `path` is."""
    for depth in range(4):
        if found := sorted(path.glob("*/" * depth + "*.trans.txt")):
            return found
    return []


def _read_librispeech(transcripts: list[Path], faults: Faults | None) -> Iterator[Utterance]:
    for transcript in transcripts:
        speaker, dash, _ = transcript.name.partition("-")
        if not dash:
            raise SAMLError(f"{transcript}: expected the name <speaker>-<chapter>.trans.txt")
        rows = []
        for number, line in enumerate(_lines(transcript), start=1):
            name, _, text = line.strip().partition(" ")
            if not name:
                continue
            try:
                if not text.strip():
                    raise SAMLError(f"{transcript}:{number}: {name} has no text")
                audio = _audio_named(transcript.parent / name, f"{transcript}:{number}")
            except SAMLError as error:
                _note(faults, speaker, error)
            else:
                rows.append(Utterance(name, speaker, text.strip(), audio))
        yield from sorted(rows, key=lambda row: row.id)


# TED-LIUM 3


def _tedlium_splits(path: Path) -> list[Path]:
    """`path` if it is a split, else the splits of a release (`legacy` first) or of a folder."""

    def is_split(folder: Path) -> bool:
        return (folder / "stm").is_dir() and (folder / "sph").is_dir()

    if is_split(path):
        return [path]
    for parent in (path / "legacy", path):
        if splits := [folder for folder in _folders(parent) if is_split(folder)]:
            return splits
    return []


def _read_tedlium(split: Path, faults: Faults | None) -> Iterator[Utterance]:
    for stm in sorted((split / "stm").glob("[!.]*.stm")):
        try:
            segments = list(parse_stm(_lines(stm), str(stm)))
        except SAMLError as error:
            _note(faults, str(stm), error)
            continue
        for segment in sorted(segments, key=lambda segment: (segment.recording, segment.start)):
            try:
                audio = _audio_named(split / "sph" / segment.recording, str(stm))
            except SAMLError as error:
                _note(faults, segment.speaker, error)
                continue
            yield Utterance(
                id=segment.id,
                speaker=segment.speaker,
                text=segment.text,
                audio=audio,
                start=segment.start,
                end=segment.end,
                duration=round(segment.end - segment.start, 3),
            )


# JSON-lines manifest


def _read_manifest(
    path: Path, need_text: bool, need_audio: bool, faults: Faults | None
) -> Iterator[Utterance]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = owner = f"{path}:{number}"
        try:
            row = _json_object(line, where)
            owner = _string(row, "speaker", where)
            utterance = _manifest_row(path, row, owner, where, need_text, need_audio)
        except SAMLError as error:
            _note(faults, owner, error)
        else:
            yield utterance


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise SAMLError(f"{where}: bad JSON ({reason}); expected one object a line") from error
    if not isinstance(row, dict):
        raise SAMLError(f"{where}: expected one JSON object a line with audio, text and speaker")
    return row


def _manifest_row(
    path: Path, row: dict[str, Any], speaker: str, where: str, need_text: bool, need_audio: bool
) -> Utterance:
    name = _string(row, "audio", where)
    text = _string(row, "text", where) if need_text or row.get("text") else ""
    audio = path.parent / name
    # os.path.isfile: False, not an exception, for names too long or with a zero byte.
    if need_audio and not os.path.isfile(audio):
        raise SAMLError(f"{where}: audio {audio} is not on disk (paths are relative to the file)")
    start, end, duration = (_seconds(row, key, where) for key in ("start", "end", "duration"))
    if end is not None and end <= (start or 0.0):
        raise SAMLError(f"{where}: end {end:g} s is not after start {start or 0.0:g} s")
    if row.get("id") is not None:
        name = _string(row, "id", where)
    elif start is not None or end is not None:
        name = f"{name}:{start or 0.0:g}-{'' if end is None else f'{end:g}'}"
    return Utterance(name, speaker, " ".join(text.split()), audio, start, end, duration)


def _string(row: dict[str, Any], key: str, where: str) -> str:
    """A field that has to be there; numbers are taken for names, as in `"speaker": 163`."""
    value = row.get(key)
    if key != "text" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        state = "no" if value is None else "an empty" if value == "" else "a bad"
        raise SAMLError(f"{where}: row has {state} {key!r}; expected a non-empty string")
    return value


def _seconds(row: dict[str, Any], key: str, where: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise SAMLError(f"{where}: {key} is {value!r}; expected seconds, 0 or more")
    return float(value)


# Folder of clips


def _clips(folder: Path) -> dict[str, list[Path]]:
    """Audio and text files directly in `folder` by stem; empty if it holds no audio."""
    clips: dict[str, list[Path]] = {}
    heard = False
    for file in sorted(folder.iterdir()):
        suffix = file.suffix.lower()
        is_audio = suffix in AUDIO_SUFFIXES
        if (is_audio or suffix == ".txt") and not file.name.startswith(".") and file.is_file():
            clips.setdefault(file.stem, []).append(file)
            heard = heard or is_audio
    return clips if heard else {}


def _read_clips(folder: Path, need_text: bool, faults: Faults | None) -> Iterator[Utterance]:
    speaker = folder.resolve().name
    warn_of_others(folder)
    for stem, files in _clips(folder).items():
        try:
            utterance = _clip(folder, speaker, stem, files, need_text)
        except SAMLError as error:
            _note(faults, speaker, error)
        else:
            yield utterance


def _clip(folder: Path, speaker: str, stem: str, files: list[Path], need_text: bool) -> Utterance:
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    audio = [file for file in files if file not in texts]
    if need_text and not texts:
        raise SAMLError(f"{audio[0]}: no text for this clip; expected {stem}.txt beside it")
    if not audio:
        raise SAMLError(f"{texts[0]}: no audio for this text; expected {stem}.wav beside it")
    if len(audio) != 1 or len(texts) > 1:
        names = ", ".join(file.name for file in files)
        raise SAMLError(f"{folder}: {names}; expected one audio and one text file a clip")
    text = " ".join(" ".join(line for file in texts for line in _lines(file)).split())
    if need_text and not text:
        raise SAMLError(f"{texts[0]}: empty; expected what is said in {audio[0].name}")
    return Utterance(f"{speaker}-{stem}", speaker, text, audio[0])


# Files


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if child.is_dir() and child.name[0] != ".")


def _audio_named(stem: Path, where: str) -> Path:
    """The audio file called `stem` plus a known suffix."""
    for suffix in AUDIO_SUFFIXES:
        file = stem.with_name(stem.name + suffix)
        if os.path.isfile(file):
            return file
    raise SAMLError(f"{where}: no audio for {stem.name}; expected {stem}.flac, .wav, .mp3, ...")


def _lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, without their line feeds."""
    try:
        # Not str.splitlines: transcripts may hold U+2028 and its like inside a line.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SAMLError(f"{path}: not UTF-8 text; save it as UTF-8") from error


def utterances_of(data: Any, rate: int = SAMPLE_RATE, *, need_text: bool = True) -> list[Utterance]:
    """Speech in any of the forms that people have it in.

    Args:
        data: a path that `load_corpus` reads, utterances, or pairs of (audio, text), where audio
            is a file or samples (see `samples_of`).
        rate: samples a second of audio that is given as samples.
        need_text: as for `load_corpus`.

    Raises:
        SAMLError: as `load_corpus` and `samples_of`, or something else than these.
    """
    if isinstance(data, str | os.PathLike):
        return load_corpus(data, need_text=need_text)
    utterances: list[Utterance] = []
    for number, one in enumerate(data):
        if isinstance(one, Utterance):
            utterances.append(one)
            continue
        if not (isinstance(one, list | tuple) and len(one) == 2 and isinstance(one[1], str)):
            raise SAMLError(
                f"speech {number}: {type(one).__name__}; expected a path, or (audio, text) pairs"
            )
        name, given = f"clip{number}", samples_of(one[0], rate)
        path, samples = (given, None) if isinstance(given, Path) else (Path(name), given)
        utterances.append(Utterance(name, SOMEBODY, one[1], path, samples=samples))
    return utterances


def only_speaker(
    utterances: Sequence[Utterance], speaker: str | None, source: Any = "speech"
) -> list[Utterance]:
    """The utterances of one speaker.

    Args:
        utterances: of one speaker or several.
        speaker: one of theirs; or any name where they are all of a folder of clips that is called
            after the folder, or of nobody in particular; None where there is one alone.
        source: where they are from, for the message.

    Raises:
        SAMLError: there is no such speaker, or there are several and none is chosen.
    """
    voices = by_speaker(utterances)
    shown = ", ".join(list(voices)[:8])
    if speaker in voices:
        return voices[speaker]
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    unnamed = SOMEBODY if path is None or not path.is_dir() else path.resolve().name
    if speaker is not None and list(voices) != [unnamed]:
        raise SAMLError(f"{source}: no speaker {speaker}; it has {len(voices)} speakers: {shown}")
    if len(voices) > 1:
        raise SAMLError(
            f"{source}: has {len(voices)} speakers ({shown}); choose one with --speaker"
        )
    return list(utterances)
