"""Who is heard in a recording: as told, by a list, or chosen among the enrolled."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saml_kernels.errors import SAMLError
from saml_models.data.audio import load_audio
from saml_models.models.registry import bind
from saml_models.speakers.identify import identify
from saml_models.speakers.profile import SpeakerProfile
from saml_models.speakers.store import AUTO, ProfileStore

__all__ = ["Choice", "choose_speakers", "read_map"]

NOBODY = ("", "-")  # in a list: the model as it is


@dataclass
class Choice:
    """Who is to be heard in each recording.

    Attributes:
        wanted: by recording, in order: a profile, None for nobody, or "auto".
        enrolled: among whom "auto" chooses; empty where nothing asks for it.
        profiles: those that are asked for, by name or file.
        on_note: told in a line what "auto" chose, and who could not be chosen.
    """

    wanted: list[SpeakerProfile | str | None]
    enrolled: list[SpeakerProfile] = field(default_factory=list)
    profiles: dict[str, SpeakerProfile] = field(default_factory=dict)
    on_note: Callable[[str], None] = lambda note: None

    def for_files(
        self, model: Any, processor: Any, files: Sequence[Path]
    ) -> list[SpeakerProfile | None]:
        """A profile, or None, for each recording; "auto" is resolved by `identify`."""
        chosen: list[SpeakerProfile | None] = []
        if self.enrolled:
            self.enrolled = [p for p in self.enrolled if self._fits(p, model)]
            if not self.enrolled:
                raise SAMLError("--speaker auto: nobody is enrolled for this model")
        for file, speaker in zip(files, self.wanted, strict=True):
            if isinstance(speaker, str):
                match = identify(bind(model, processor), load_audio(file), self.enrolled)
                self.on_note(f"{file}: {match}")
                speaker = match.profile
            chosen.append(speaker)
        return chosen

    def _fits(self, profile: SpeakerProfile, model: Any) -> bool:
        """Whether an enrolled speaker can be chosen with this model."""
        try:
            profile.check(model)
            if profile.embedding is None:
                raise SAMLError("has no embedding; adapt to its speech to enrol it for auto")
        except SAMLError as error:
            self.on_note(f"{profile.name}: left out: {error}")
            return False
        return True


def choose_speakers(
    files: Sequence[Path],
    speaker: str | None,
    listed: dict[Path, str] | None,
    folder: str | os.PathLike[str] | None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Choice:
    """Profiles are read and checked before anything is transcribed.

    Args:
        files: the recordings.
        speaker: for all of them: an enrolled name, a profile's file, "auto", or None.
        listed: by recording, the same; what `read_map` gives. `files` must be in it.
        folder: of the enrolled.
        on_note: as for `Choice`.

    Raises:
        SAMLError: a speaker that is not enrolled, a damaged profile, or a file that is not listed.
    """
    store = ProfileStore(folder)
    if listed is None:
        wanted = [speaker] * len(files)
    else:
        by_place = {path.resolve(): name for path, name in listed.items()}
        missing = [file for file in files if file.resolve() not in by_place]
        if missing:
            raise SAMLError(f"{missing[0]}: is not in the list of speakers; add a line for it")
        wanted = [by_place[file.resolve()] for file in files]
    choice = Choice([], on_note=on_note)
    read = choice.profiles
    for name in wanted:
        if name is None or name in NOBODY:
            choice.wanted.append(None)
        elif name == AUTO:
            choice.wanted.append(AUTO)
        else:
            if name not in read:
                read[name] = SpeakerProfile.load(store.resolve(name))
            choice.wanted.append(read[name])
    if AUTO in wanted:
        if not store.names():
            raise SAMLError(f"--speaker auto: nobody is enrolled in {store.folder}")
        for name in store.names():
            try:
                choice.enrolled.append(read.get(name) or store.load(name))
            except SAMLError as error:  # one damaged file does not hide the others
                choice.on_note(f"{name}: left out: {error}")
        if not choice.enrolled:
            raise SAMLError(f"--speaker auto: nobody in {store.folder} can be read")
    return choice


def read_map(path: str | os.PathLike[str]) -> dict[Path, str]:
    """Speakers by recording from a CSV of `audio,speaker`, in its order.

    Recordings are relative to the file's folder; a speaker is an enrolled name, a profile's file,
    "auto", or nobody ("" or "-"). A first line that says `audio,speaker` is a heading.

    Raises:
        SAMLError: missing, no text, a line without two columns, or a recording listed twice.
    """
    source = Path(path)
    try:
        with open(source, newline="", encoding="utf-8-sig") as handle:
            rows = [row for row in csv.reader(handle) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise SAMLError(f"{source}: cannot be read: {reason}") from error
    if rows and [cell.strip().lower() for cell in rows[0]] == ["audio", "speaker"]:
        rows = rows[1:]
    speakers: dict[Path, str] = {}
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or not row[0].strip():
            raise SAMLError(f"{source}: row {number} is {','.join(row)!r}; expected audio,speaker")
        audio = source.parent / row[0].strip()
        if audio in speakers:
            raise SAMLError(f"{source}: lists {audio} twice; give one line to a recording")
        speakers[audio] = row[1].strip()
    if not speakers:
        raise SAMLError(f"{source}: lists no recordings; expected lines of audio,speaker")
    return speakers
