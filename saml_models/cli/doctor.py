"""The command `saml doctor`."""

from __future__ import annotations

from saml_models.cli.output import print_rows
from saml_models.runtime.quiet import quiet_libraries

__all__ = ["doctor"]


def doctor() -> None:
    """What this machine has, and which backends it will use."""
    quiet_libraries()
    from saml_models.cli.machine import report

    print_rows(report())
