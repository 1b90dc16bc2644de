"""Errors that a user can act on."""


class InputError(ValueError):
    """Bad input: one line that names the field, file or row, what was found, and what to do.

    The command line prints the message without a traceback and exits with code 2. Raise it before anything is
    written and before any model loads.
    """


def one_line(error: object, most: int | None = None) -> str:
    """The text of another library's error on one line, cut to `most` characters."""
    return " ".join(str(error).split())[:most]


class RunError(RuntimeError):
    """A run that cannot go on (an engine died too often, a mismatch bar was passed): one line, exit code 1."""
