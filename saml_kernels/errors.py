"""The one exception that bad input raises."""

__all__ = ["SAMLError"]


class SAMLError(ValueError):
    """Bad input: one line that names the input, what was expected and what to do.

    The command line prints it on standard error and exits with code 2.
    """
