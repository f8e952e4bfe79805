"""The one exception that bad input raises, and the one warning."""

__all__ = ["SAMLError", "SAMLWarning"]


class SAMLError(ValueError):
    """Bad input: one line that names the input, what was expected and what to do.

    The command line prints it on standard error and exits with code 2.
    """


class SAMLWarning(UserWarning):
    """Input that is used, but not whole or not as it is: one line that says what and how much.

    The command line prints it on standard error and goes on.
    """


def _one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .;") if lines else type(error).__name__
