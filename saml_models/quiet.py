"""Standard error is for progress and errors, not for libraries' advice to developers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from saml_kernels.errors import SAMLWarning

__all__ = ["quiet_libraries", "quiet_transformers"]


def quiet_libraries() -> None:
    """Silence libraries' warnings, log lines and progress bars, for this whole process.

    Our own warnings are about the user's input: one line each.
    """
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=SAMLWarning)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block transformers logs no warnings and draws no bars; what matters is raised."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
