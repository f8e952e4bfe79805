"""The one exception that bad input raises, and the one warning."""

__all__ = ["SAMLError", "SAMLWarning"]


class SAMLError(ValueError):
    """Bad input: one line that names the input, what was expected and what to do.

    The command line prints it on standard error and exits with code 2.
    """


class SAMLWarning(UserWarning):
    """Input that can be used, but hardly as it was meant: one line, as for `SAMLError`."""
