"""The console script `saml`, and `python -m saml_models.cli`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run `saml`; where packages of the extra "whisper" are not installed, one line says so."""
    try:
        from saml_models.cli.main import app

        app()
    except ImportError:
        from saml_kernels.errors import absent, missing

        if not absent("whisper"):
            raise
        print(missing("saml", "whisper"), file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
