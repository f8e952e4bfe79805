"""On the command line, standard error is for progress and errors, not for libraries' advice."""

from __future__ import annotations

import warnings

__all__ = ["quiet_libraries"]


def quiet_libraries() -> None:
    """Silence warnings and transformers' log lines and progress bars, for this whole process."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
