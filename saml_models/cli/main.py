"""The command `saml`: all commands, in the order in which `saml --help` lists them.

torch and transformers are imported inside the commands, so that `saml --help` answers at once.
"""

from __future__ import annotations

from saml_models.cli.adapt import adapt
from saml_models.cli.app import app
from saml_models.cli.bench import DOOR, bench
from saml_models.cli.doctor import doctor
from saml_models.cli.evaluate import demo, evaluate
from saml_models.cli.grow import grow_conformer
from saml_models.cli.quantize import quantize
from saml_models.cli.serve import serve
from saml_models.cli.speakers import speakers
from saml_models.cli.train import pretrain
from saml_models.cli.transcribe import transcribe

__all__ = ["app"]

for command in (
    *(transcribe, adapt, evaluate, pretrain, quantize),
    *(grow_conformer, serve, bench, demo, doctor),
):
    app.command(**(DOOR if command is bench else {}))(command)
app.add_typer(speakers, name="speakers")
