"""Calls of the command `saml`, what its refusals look like, and what makes them."""

import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
from typer.testing import CliRunner

from saml_models.cli.main import app


def saml(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def assert_refused(result, *parts, code=2):
    """One line on standard error that holds `parts`, nothing on standard output."""
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("saml: "), lines
    for part in parts:
        assert str(part) in lines[0]


def interrupted(monkeypatch, command, after):
    """Ctrl-C once a module's progress was shown `after` times; what it was shown, as it grows."""
    shown = []

    def show(*now):
        shown.append(now)
        if len(shown) == after:
            raise KeyboardInterrupt

    @contextmanager
    def impatient(label):
        yield show

    monkeypatch.setattr(command, "progress", impatient)
    return shown


@contextmanager
def full_disk(limit):
    """Writes beyond `limit` bytes of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def bad_audio(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.wav"
    if kind == "text":
        path.write_text("this is no audio\n" * 100)
    elif kind == "empty":
        soundfile.write(path, np.zeros(0, np.float32), 16000)
    elif kind == "nan":
        soundfile.write(path, np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    return path
