"""The one door to the benchmark: `python -m bench NAME`, in a clone also `saml bench NAME`.

Each command is a module with a function `main` that Typer understands. It is imported when it is
called: the list of commands needs no torch, and what one command lacks does not stop another.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from rich.markup import escape

from bench.place import REPOSITORY
from saml_models.cli.app import Commands

__all__ = ["COMMANDS", "app", "run"]

COMMANDS = {
    "layers": "bench.layers.run",
    "host": "bench.layers.host",
    "cpu-operator": "bench.layers.cpu_operator",
    "cpu-speakers": "bench.layers.cpu_speakers",
    "gpu": "bench.gpu.check",
    "transcription": "bench.models.transcription",
    "adaptation": "bench.models.adaptation",
    "training-step": "bench.models.training_step",
    "training-memory": "bench.models.training_memory",
    "busy-core": "bench.models.busy_core",
    "serve": "bench.models.serving",
    "defaults": "bench.accuracy.defaults",
    "experts": "bench.accuracy.experts",
    "windows": "bench.accuracy.windows",
    "conformer": "bench.accuracy.conformer",
    "rounding": "bench.accuracy.rounding",
    "rounding-layers": "bench.accuracy.rounding_layers",
    "rounding-memory": "bench.accuracy.rounding_memory",
    "own-words": "bench.accuracy.own_words",
    "identification": "bench.accuracy.identification",
    "profiles": "bench.accuracy.profiles",
    "report": "bench.report.write",
}
DEFAULT = "layers"


class _Door(Commands):
    """Options without a name before them are those of `DEFAULT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="bench",
    cls=_Door,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Times and word error rates of this clone beside others'. Options alone are those of "
    "`layers`. `saml bench --tune` measures tiles for this GPU and keeps the best.",
)


def _summary(module: str) -> str:
    """The first line of a module's docstring, read and not imported."""
    with open(REPOSITORY / f"{module.replace('.', '/')}.py", encoding="utf-8") as file:
        return file.readline().strip().strip('"')


def _starter(module: str) -> Callable[[typer.Context], Any]:
    def start(ctx: typer.Context) -> Any:
        found = import_module(module)
        only = typer.Typer(
            add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
        )
        only.command(help=found.__doc__)(found.main)
        return run(only, ctx.args, ctx)

    return start


def run(what: typer.Typer, arguments: list[str], within: typer.Context) -> Any:
    """Run an application in place of the command of `within`, under that command's name."""
    command = typer.main.get_command(what)
    context = command.make_context(within.info_name, list(arguments), parent=within.parent)
    with context:
        return command.invoke(context)


for _name, _module in COMMANDS.items():
    app.command(
        _name,
        help=escape(_summary(_module)),
        add_help_option=False,  # the command's own shows its options
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_starter(_module))
