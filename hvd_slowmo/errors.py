"""Errors with a class of their own, and an error of another library in words."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that can't be written or read, or that does not fit; nothing has been changed.

    Example:
        >>> issubclass(CheckpointError, ValueError)
        True
    """


class CommandError(Exception):
    """An argument of the command line, or a file named there, that can't be used.

    Example:
        >>> str(CommandError("there is no file weights.pt."))
        'there is no file weights.pt.'
    """


def spell_error(error: BaseException) -> str:
    """Return an error with its class, for libraries whose messages alone may say little.

    Example:
        >>> spell_error(KeyError("weight"))
        "KeyError: 'weight'"
    """
    return f"{type(error).__name__}: {error}"
