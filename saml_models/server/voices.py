"""The voices of one owner on disk: profiles, and what is recorded to learn them."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from saml_kernels.errors import SAMLError
from saml_kernels.files import atomic_path, read_json, write_json
from saml_models.data.audio import SAMPLE_RATE
from saml_models.speakers.profile import SpeakerProfile
from saml_models.speakers.store import ProfileStore, check_name

__all__ = ["Profiles", "StoreError", "Voice", "Voices", "is_running", "read_profile"]

LONGEST_TEXT = 1000  # characters of a clip's text
HELD_BACK = 5  # of so many clips one is kept, to tell before from after
_CLIP = re.compile(r"\d{4}")


class StoreError(SAMLError):
    """A file of the server's own cannot be read or written: no fault of who asks."""


@contextmanager
def _stored(path: Path) -> Iterator[None]:
    """Within the block errors are the store's; they do not say in which folder it is."""
    try:
        yield
    except SAMLError as error:
        raise StoreError(str(error).replace(f"{path.parent}{os.sep}", "")) from error


class Profiles:
    """Profiles by file, each read once: the same speaker is the same object in every batch.

    From any thread but an event loop's: reading takes its time, and who comes meanwhile waits.
    """

    def __init__(self, most: int) -> None:
        """Keep `most` in memory."""
        self.most = most
        self._read: OrderedDict[Path, tuple[tuple[int, int], SpeakerProfile]] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, path: Path) -> SpeakerProfile:
        """The profile in a file, read again when the file has changed."""
        try:
            stat = path.stat()
        except OSError as error:
            raise SAMLError(f"{path.stem}: no such speaker") from error
        stamp = stat.st_mtime_ns, stat.st_size
        with self._lock:
            if path in self._read and self._read[path][0] == stamp:
                self._read.move_to_end(path)
                return self._read[path][1]
            with _stored(path):
                profile = SpeakerProfile.load(path)
            self._read[path] = stamp, profile
            while len(self._read) > self.most:
                self._read.popitem(last=False)
            return profile

    def forget(self, path: Path) -> None:
        """Leave nothing of a file that is gone in memory."""
        with self._lock:
            self._read.pop(path, None)


class Voice:
    """One voice: its profile, if it has been learnt, and its recordings.

    Nothing is locked: a server makes, edits and deletes voices on its event loop alone.

    Attributes:
        name: checked.
        path: of the profile, there or not.
        folder: of the recordings and of what learning leaves, there or not.
    """

    def __init__(self, store: ProfileStore, name: str) -> None:
        """Raise SAMLError where the name is not safe."""
        self.name = check_name(name)
        self.path = store.path(name)
        self.folder = store.recordings(name)

    @property
    def exists(self) -> bool:
        """Whether there is a profile, or recordings for one."""
        return self.path.is_file() or (self.folder / "voice.json").is_file()

    @property
    def notes(self) -> dict[str, Any]:
        """What was said when it was made: `identify`, and the clips' texts and seconds by id."""
        return self._read("voice.json", {"identify": False, "clips": {}})

    def create(self, identify: bool) -> None:
        """Make room for recordings; what is there stays."""
        self._write("voice.json", self.notes | {"identify": identify})

    def enrol(self, profile: SpeakerProfile, identify: bool) -> None:
        """Store a profile from elsewhere as this voice's."""
        named = replace(profile, about=profile.about | {"speaker": self.name})
        with _stored(self.path):
            named.save(self.path)
        if identify:
            self.create(identify)

    def add(self, clip: npt.NDArray[np.float32], text: str, id: str | None, most: int) -> str:
        """Store a clip with its text, in place of another's if `id` is given.

        Returns:
            Its id.

        Raises:
            SAMLError: no text or too much, more than 30 s, no such id, or more than `most` clips.
            StoreError: it cannot be written.
        """
        text = " ".join(text.split())
        if not text or len(text) > LONGEST_TEXT:
            raise SAMLError(
                f"text: {len(text)} characters; expected what is said, up to {LONGEST_TEXT}"
            )
        if not 0.3 * SAMPLE_RATE <= len(clip) <= 30 * SAMPLE_RATE:
            raise SAMLError(f"clip: {len(clip) / SAMPLE_RATE:.1f} s; expected 0.3 to 30 s")
        notes = self.notes
        clips = notes["clips"]
        if id is not None and id not in clips:
            raise SAMLError(f"clip {id!r}: there is no such clip")
        if id is None:
            if len(clips) >= most:
                raise SAMLError(f"clips: there are {len(clips)}; the limit of clips is {most}")
            id = f"{max(map(int, clips), default=0) + 1:04d}"
        path = self.clip(id)
        with _stored(path), atomic_path(path) as temporary:
            soundfile.write(temporary, np.clip(clip, -1, 1), SAMPLE_RATE, "PCM_16", format="FLAC")
        clips[id] = {"text": text, "seconds": round(len(clip) / SAMPLE_RATE, 2)}
        self._write("voice.json", notes)
        return id

    def clip(self, id: str) -> Path:
        """The file of a clip.

        Raises:
            SAMLError: it is no id.
        """
        if not _CLIP.fullmatch(id):
            raise SAMLError(f"clip {id!r}: there is no such clip")
        return self.folder / "clips" / f"{id}.flac"

    def remove_clip(self, id: str) -> None:
        """Delete a recording and its text."""
        notes, path = self.notes, self.clip(id)
        if notes["clips"].pop(id, None) is None:
            raise SAMLError(f"clip {id!r}: there is no such clip")
        self._write("voice.json", notes)
        path.unlink(missing_ok=True)

    @property
    def status(self) -> dict[str, Any]:
        """How far learning is: `state` is recording, queued, learning, learnt or failed."""
        at_rest = "learnt" if self.path.is_file() else "recording"
        return self._read("status.json", {"state": at_rest})

    @status.setter
    def status(self, value: dict[str, Any]) -> None:
        if self.folder.is_dir():  # a deleted voice stays deleted
            self._write("status.json", value)

    def describe(self, profiles: Profiles) -> dict[str, Any]:
        """What an owner sees of it."""
        notes = self.notes
        found: dict[str, Any] = {
            "name": self.name,
            "enrolled": self.path.is_file(),
            "identify": bool(notes.get("identify")),
            "clips": [{"id": id, **clip} for id, clip in sorted(notes["clips"].items())],
            "status": self.status,
        }
        if found["enrolled"]:
            try:
                profile = profiles.load(self.path)
            except SAMLError as error:
                return found | {"error": str(error)}
            found["profile"] = {
                key: profile.about[key]
                for key in (
                    "model", "date", "method", "utterances", "seconds", "wer_before", "wer_after",
                    "test_utterances",
                )
                if key in profile.about
            } | {"hash": profile.hash, "kind": profile.kind}  # fmt: skip
        return found

    def delete(self) -> None:
        """Everything of the person: profile, recordings, texts, checkpoints and progress."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    def _read(self, file: str, otherwise: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / file
        if not path.is_file():
            return otherwise
        with _stored(path):
            found = read_json(path)
        return found

    def _write(self, file: str, value: dict[str, Any]) -> None:
        path = self.folder / file
        with _stored(path):
            write_json(path, value)


class Voices:
    """All voices of one owner."""

    def __init__(self, folder: Path, profiles: Profiles) -> None:
        self.store, self.profiles = ProfileStore(folder), profiles

    def names(self) -> list[str]:
        """Of all voices, learnt or not, sorted."""
        begun = {path.parent.name for path in self.store.folder.glob("enrolment/*/voice.json")}
        return sorted({*self.store.names(), *begun})

    def find(self, name: str) -> Voice:
        """A voice that is there.

        Raises:
            KeyError: there is none of this name, whatever the name is.
        """
        try:
            voice = Voice(self.store, name)
        except SAMLError:
            raise KeyError(name) from None
        if not voice.exists:
            raise KeyError(name)
        return voice

    def profile(self, name: str) -> SpeakerProfile:
        """A learnt voice's profile.

        Raises:
            KeyError: there is none.
        """
        voice = self.find(name)
        if not voice.path.is_file():
            raise KeyError(name)
        return self.profiles.load(voice.path)

    def candidates(self) -> list[SpeakerProfile]:
        """The profiles of those who agreed to be recognised by their voice."""
        found = []
        for name in self.store.names():
            voice = Voice(self.store, name)
            with suppress(SAMLError):  # one damaged file does not hide the others
                if voice.notes.get("identify"):
                    profile = self.profiles.load(voice.path)
                    if profile.embedding is not None:
                        found.append(profile)
        return found


def read_profile(file: BinaryIO) -> SpeakerProfile:
    """A profile from elsewhere.

    Raises:
        SAMLError: it is none.
    """
    with NamedTemporaryFile() as given:
        shutil.copyfileobj(file, given)
        given.flush()
        try:
            return SpeakerProfile.load(given.name)
        except SAMLError as error:
            text = str(error).replace(f"{given.name}: ", "")
            raise SAMLError(f"profile: {text}") from error


def is_running(status: dict[str, Any]) -> bool:
    """Whether a voice waits to be learnt, or is."""
    return status.get("state") in ("queued", "learning")
