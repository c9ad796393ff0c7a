"""Errors with a class of their own, errors that all workers raise together, and foreign errors in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


def escape_controls(text: str) -> str:
    r"""Return a text with escapes in place of control characters, which would act on a terminal.

    Line ends and tabs stay.

    Example:
        >>> escape_controls("\x1b[2Jweight")
        '\\x1b[2Jweight'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class CheckpointError(ValueError):
    r"""A checkpoint that can't be written or read, or that does not fit; nothing has been changed.

    Control characters of the text, which may come from a file, are escaped.

    Example:
        >>> str(CheckpointError("the checkpoint holds \x1b[2J."))
        'the checkpoint holds \\x1b[2J.'
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(escape_controls(text))


class CheckpointFileError(CheckpointError, OSError):
    """A file of a checkpoint that the system refuses to read or write on one worker; raised on every worker.

    `errno` is that of the system's error, on every worker.

    Example:
        >>> issubclass(CheckpointFileError, CheckpointError), issubclass(CheckpointFileError, OSError)
        (True, True)
    """


class CommandError(Exception):
    """An argument of the command line, or a file named there, that can't be used.

    Control characters of the text, which may come from a file, are escaped.

    Example:
        >>> str(CommandError("there is no file weights.pt."))
        'there is no file weights.pt.'
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(escape_controls(text))


def spell_error(error: BaseException) -> str:
    """Return an error with its class, for libraries whose messages alone may say little.

    Example:
        >>> spell_error(KeyError("weight"))
        "KeyError: 'weight'"
    """
    return f"{type(error).__name__}: {error}"


_SHARED: tuple[type[Exception], ...] = (
    CheckpointFileError,
    CheckpointError,
    TypeError,
    ValueError,
    RuntimeError,
    MemoryError,
    OSError,
)
"""Types that every worker can raise with a text alone, subclasses first."""


class SharedError(NamedTuple):
    """One worker's error on its way to the others.

    Attributes:
        kind: name of the type that all workers raise.
        text: its message.
        errno: of an error of the system.
    """

    kind: str
    text: str
    errno: int | None


def share(error: Exception) -> SharedError:
    """Return an error as the other workers can raise it; a type that they may not have becomes a ValueError.

    Example:
        >>> share(PermissionError(13, "Permission denied", "job"))
        SharedError(kind='OSError', text="[Errno 13] Permission denied: 'job'", errno=13)
        >>> share(KeyError("weight"))
        SharedError(kind='ValueError', text="KeyError: 'weight'", errno=None)
    """
    for kind in _SHARED:
        if isinstance(error, kind):
            return SharedError(kind.__name__, str(error), error.errno if isinstance(error, OSError) else None)
    return SharedError(ValueError.__name__, spell_error(error), None)


def raise_together(name: str, errors: Sequence[tuple[int, SharedError]], size: int, own: Exception | None) -> None:
    """Raise one error on every worker: the type of the first one, with the ranks at fault in its text.

    An error that all workers have met alike is raised as it is.

    Args:
        name: of the job, for the text.
        errors: rank and error of each worker that has one, in an order that all workers share.
        size: number of workers.
        own: this worker's error, if it has one.

    Example:
        >>> raise_together("slowmo", [], 2, None)
        >>> raise_together("slowmo", [(1, share(TypeError("`tau` must be an integer")))], 2, None)
        Traceback (most recent call last):
        TypeError: slowmo: rank 1: `tau` must be an integer
    """
    if not errors:
        return
    if own is not None and len(errors) == size and len({error for _, error in errors}) == 1:
        raise own
    _, first = errors[0]
    kind = next(kind for kind in _SHARED if kind.__name__ == first.kind)
    raised = kind(f"{name}: {'; '.join(f'rank {rank}: {error.text}' for rank, error in errors)}")
    if isinstance(raised, OSError):
        raised.errno = first.errno
    raise raised from own
