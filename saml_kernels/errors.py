"""Bad input's exception and warning, and the error for a package that is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

__all__ = [
    "EXTRAS",
    "MissingExtra",
    "SAMLError",
    "SAMLWarning",
    "absent",
    "install",
    "missing",
    "needs",
    "one_line",
]

# The packages of each extra in pyproject.toml, by the names under which they are imported; what
# comes with "whisper" stands there alone.
EXTRAS = {
    "whisper": (
        "transformers", "accelerate", "safetensors", "jiwer", "whisper_normalizer", "soundfile",
        "soxr", "typer", "rich", "platformdirs",
    ),
    "audio": ("av",),
    "triton": ("triton",),
    "figures": ("matplotlib",),
    "bitsandbytes": ("bitsandbytes",),
    "ray": ("ray",),
    "demo": ("matplotlib", "pooch"),
    "serve": ("fastapi", "uvicorn", "python_multipart", "av", "prometheus_client"),
}  # fmt: skip


class SAMLError(ValueError):
    """Bad input: one line that names the input, what was expected and what to do.

    The command line prints it on standard error and exits with code 2.
    """


class MissingExtra(SAMLError, ImportError):
    """A package that an extra brings is not installed or does not load; the line names both."""


class SAMLWarning(UserWarning):
    """Input that is used, but not whole or not as it is: one line that says what and how much.

    The command line prints it on standard error and goes on.
    """


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'saml-kernels[{extra}]'"


def absent(extra: str) -> list[str]:
    """Packages of an extra of `EXTRAS` that are not installed; imports none of them."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def missing(what: str, extra: str, error: ImportError | None = None) -> MissingExtra:
    """The error for `what`, which needs the packages of an extra.

    Args:
        what: a function or an option, as the user knows it.
        extra: of `EXTRAS`.
        error: what the import raised; quoted where the packages are there and one does not load.
    """
    names = absent(extra)
    reason = one_line(error) if error is not None and not names else f"needs {', '.join(names)}"
    return MissingExtra(f"{what}: {reason}: {install(extra)}")


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """A block of imports of an extra's packages.

    Raises:
        MissingExtra: one of them cannot be imported. A fault in an import of this package's own
            modules stays what it is.
    """
    try:
        yield
    except ImportError as error:
        if isinstance(error, MissingExtra) or (error.name or "").startswith("saml_"):
            raise
        raise missing(what, extra, error) from error


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .;") if lines else type(error).__name__
