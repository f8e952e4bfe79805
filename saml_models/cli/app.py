"""The Typer application: every command fails in one line on standard error, with exit code 2."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

__all__ = ["Commands", "app"]

INTERRUPTED = 130  # exit code of Ctrl-C, as shells give it


class Commands(TyperGroup):
    """Commands that fail in one line, which begins with the outermost application's name."""

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
            print(f"{_program(ctx)}: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as stop:
            print(f"{_program(ctx)}: {str(stop) or 'interrupted'}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from stop


app = typer.Typer(
    name="saml",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Whisper and Conformer at a seventh of their size, and experts that learn a voice.",
)


def _program(ctx: Any) -> str:
    return str(ctx.find_root().command.name)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
