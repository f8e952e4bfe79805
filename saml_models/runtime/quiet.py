"""Standard error is for progress and errors, not for libraries' advice to developers.

What matters of what they would log is raised.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["check_complete", "quiet_libraries", "quiet_transformers"]


def quiet_libraries() -> None:
    """Silence warnings and transformers' log lines and progress bars, for this whole process.

    The package's own warnings are shown, each once, as one line on standard error.
    """
    from transformers.utils import logging

    from saml_kernels.errors import SAMLWarning

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=SAMLWarning)
    warnings.showwarning = _one_line
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _one_line(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"saml: {' '.join(str(message).split())}", file=sys.stderr)


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


def check_complete(name: object, report: Mapping[str, Iterable[str]], remedy: str) -> None:
    """Refuse weights of which `from_pretrained` did not find all, and only logged it.

    Args:
        name: what was loaded.
        report: its loading info.
        remedy: what to do about a damaged file.

    Raises:
        SAMLError: some are missing.
    """
    from saml_kernels.errors import SAMLError

    missing = sorted(map(str, report["missing_keys"]))
    if missing and any(str(key).endswith(".weight.codes") for key in report["unexpected_keys"]):
        raise SAMLError(
            f"{name}: holds low-bit weights; import saml_models.hf first if its config.json has a "
            "quantization_config, else save that model again with save_pretrained or save_saml"
        )
    if missing:
        raise SAMLError(f"{name}: lacks {len(missing)} weights, such as {missing[0]}; {remedy}")
