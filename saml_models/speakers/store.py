"""A folder of enrolled speakers: one profile each, named after the speaker."""

from __future__ import annotations

import os
import re
import shutil
from functools import cached_property
from pathlib import Path

from saml_kernels.errors import SAMLError
from saml_models.runtime.folders import data_folder
from saml_models.speakers.profile import SpeakerProfile

__all__ = ["AUTO", "ProfileStore", "check_name", "default_folder"]

SUFFIX = ".safetensors"
AUTO = "auto"  # `--speaker auto` chooses among the enrolled: nobody can be called that
_NAME = re.compile(r"[^\W_][\w.\- ]{0,47}(?<![. ])")


def default_folder() -> Path:
    """$SAML_SPEAKERS, else speakers/ in the user's `data_folder`.

    Raises:
        SAMLError: as `data_folder`.
    """
    given = os.environ.get("SAML_SPEAKERS")
    return Path(given) if given else data_folder() / "speakers"


def check_name(name: str) -> str:
    """A speaker's name that is safe as a file's: letters, digits, blanks and . _ -, up to 48.

    Raises:
        SAMLError: it is anything else, a path above all.
    """
    if not _NAME.fullmatch(name) or name.casefold() == AUTO:
        raise SAMLError(
            f"speaker {name!r}: not a name to store under; expected up to 48 letters, digits, "
            f"blanks, '.', '_' or '-', a letter or digit first, and not {AUTO!r}"
        )
    return name


class ProfileStore:
    """Profiles in a folder, by speakers' names."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        """`folder` is made when the first profile is saved; None is `default_folder`."""
        self._given = folder

    @cached_property
    def folder(self) -> Path:
        """Where the profiles are; looked for when first asked for, as not every user has a home.

        Raises:
            SAMLError: as `default_folder`.
        """
        return default_folder() if self._given is None else Path(self._given)

    def path(self, name: str) -> Path:
        """The file of a speaker, there or not.

        Raises:
            SAMLError: the name is not safe.
        """
        return self.folder / f"{check_name(name)}{SUFFIX}"

    def recordings(self, name: str) -> Path:
        """The folder of what a server has recorded of a speaker, there or not.

        Raises:
            SAMLError: the name is not safe.
        """
        return self.folder / "enrolment" / check_name(name)

    def names(self) -> list[str]:
        """Names of the enrolled speakers, sorted."""
        stems = [p.stem for p in self.folder.glob(f"*{SUFFIX}") if _NAME.fullmatch(p.stem)]
        return sorted(stems)

    def find(self, name: str) -> Path:
        """The file of an enrolled speaker.

        Raises:
            SAMLError: nobody of that name is enrolled.
        """
        path = self.path(name)
        if not path.is_file():
            names = ", ".join(self.names()[:8]) or "nobody"
            raise SAMLError(f"speaker {name}: not in {self.folder} (which has {names})")
        return path

    def load(self, name: str) -> SpeakerProfile:
        """An enrolled speaker's profile.

        Raises:
            SAMLError: as `find` and `SpeakerProfile.load`.
        """
        return SpeakerProfile.load(self.find(name))

    def resolve(self, name_or_file: str | os.PathLike[str]) -> Path:
        """A profile's file as it is, or that of an enrolled speaker.

        Raises:
            SAMLError: there is neither.
        """
        given = Path(name_or_file)
        if given.is_file():
            return given
        name = os.fspath(name_or_file)
        if given.suffix == SUFFIX or given.name != name:
            raise SAMLError(f"{name}: no such file")
        return self.find(name)

    def save(self, profile: SpeakerProfile, name: str | None = None) -> Path:
        """Enrol under `name` (the profile's own unless given), in place of who had it.

        Raises:
            SAMLError: the name is not safe, or the file cannot be written.
        """
        path = self.path(profile.name if name is None else name)
        profile.save(path)
        return path

    def remove(self, name: str) -> None:
        """Delete an enrolled speaker's profile, and what a server has recorded of it.

        Raises:
            SAMLError: nobody of that name is enrolled, or the file cannot be deleted.
        """
        path = self.find(name)
        try:
            path.unlink()
            shutil.rmtree(self.recordings(name), ignore_errors=True)
        except OSError as error:
            raise SAMLError(f"{path}: cannot be removed: {error.strerror}") from error
