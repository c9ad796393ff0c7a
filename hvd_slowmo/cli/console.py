"""Text on a terminal: of a file or of other programs, and the installer's progress."""

from __future__ import annotations

import sys
from types import TracebackType

from hvd_slowmo.errors import escape_controls

_SECONDS_BETWEEN_LINES = 20.0


def show(text: str) -> None:
    r"""Print a text, with escapes in place of control characters: it may come from a file.

    Example:
        >>> show("\x1b[2Jweight")
        \x1b[2Jweight
    """
    print(escape_controls(text))


class Console:
    """A `Reporter` that prints to stdout.

    In a terminal, progress is one line that is redrawn. Otherwise, a new line appears about every 20 seconds. On exit,
    the context manager erases the redrawn line.

    Args:
        verbose: print the output of the commands too, and do not redraw lines.

    Example:
        >>> with Console(verbose=False) as console:
        ...     console.say("building Horovod")
        building Horovod
    """

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._terminal = sys.stdout.isatty() and not verbose
        self._drawn = False
        self._last_line = 0.0

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.finish_progress()

    def say(self, text: str) -> None:
        """Print one line."""
        self.finish_progress()
        print(escape_controls(text), flush=True)

    def detail(self, line: str) -> None:
        """Print one line of a command's output, if verbose."""
        if self._verbose:
            print(escape_controls(line), flush=True)

    def progress(self, what: str, percent: int | None, seconds: float, note: str = "") -> None:
        """Redraw the progress line, or print a new one if the last is at least 20 seconds old."""
        share = "" if percent is None else f"{percent:3d} %, "
        text = f"  {what}: {share}{int(seconds) // 60} min {int(seconds) % 60:02d} s{', ' if note else ''}{note}"
        text = escape_controls(text)
        if self._terminal:
            print(f"\r{text}\033[K", end="", flush=True)
            self._drawn = True
        elif seconds >= self._last_line + _SECONDS_BETWEEN_LINES:
            print(text, flush=True)
            self._last_line = seconds

    def finish_progress(self) -> None:
        """Erase the progress line."""
        if self._drawn:
            print("\r\033[K", end="", flush=True)
            self._drawn = False
        self._last_line = 0.0
