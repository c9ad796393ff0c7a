"""Output of workers: whole lines with their rank, few states of a progress bar, and the error at the end."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

SECONDS_BETWEEN_STATES = 10.0
"""Least time between two states of one progress bar."""

_LOOK_MS = 100

_KEPT = 500
_TAIL = 20
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_CONSEQUENCE = re.compile("HorovodInternalError|Horovod has been shut down")


class LineReader:
    r"""Splits a stream into lines. A line that is redrawn with "\r" is shown now and then, and in its last state.

    Args:
        show: takes a line without its end.
        clock: seconds; for tests.

    Example:
        >>> reader = LineReader(print)
        >>> reader.feed("\r 0 %\r50 %\r99 %\r100 %\nbye")
         0 %
        100 %
        >>> reader.close()
        bye
    """

    def __init__(self, show: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._show = show
        self._clock = clock
        self._rest = ""  # begun, and not ended
        self._state = ""  # of a redrawn line, ended by "\r" and not shown
        self._redrawn = False
        self._shown_at: float | None = None

    def feed(self, text: str) -> None:
        """Take the next characters of the stream."""
        *ended, self._rest = re.split("(?<=[\r\n])", self._rest + text)
        for line in ended:
            (self._redraw if line[-1] == "\r" else self._end)(line[:-1])

    def close(self) -> None:
        """Show the last line, if nothing ends it."""
        if self._rest or self._state:
            self._end(self._rest)

    def _redraw(self, state: str) -> None:
        if not state:
            return
        self._state, self._redrawn = state, True
        now = self._clock()
        if self._shown_at is None or now - self._shown_at >= SECONDS_BETWEEN_STATES:
            self._show(state)
            self._state, self._shown_at = "", now

    def _end(self, line: str) -> None:
        if line or self._state or not self._redrawn:  # otherwise "\n" ends a state that has been shown
            self._show(line or self._state)
        self._state, self._redrawn, self._shown_at = "", False, None


def copy_lines(descriptor: int, show: Callable[[str], None], over: threading.Event) -> None:
    """Read a stream to its end, and show its lines.

    Args:
        descriptor: of a pipe.
        show: takes a line.
        over: set once the worker has ended. What is in the pipe then is shown; a process that the worker has left
            behind may hold the pipe, and is not waited for.

    Example:
        >>> reader, writer = os.pipe()
        >>> _ = os.write(writer, b"hello")
        >>> os.close(writer)
        >>> copy_lines(reader, print, threading.Event())
        hello
        >>> os.close(reader)
    """
    lines, decoder = LineReader(show), codecs.getincrementaldecoder("utf-8")("replace")
    poll, left = select.poll(), _capacity(descriptor)
    poll.register(descriptor, select.POLLIN)
    while left > 0:
        ended = over.is_set()  # before the look: what comes later may be of others
        if poll.poll(_LOOK_MS):
            chunk = os.read(descriptor, 2**16)
            if not chunk:
                break
            lines.feed(decoder.decode(chunk))
            left -= len(chunk) if ended else 0
        elif ended:
            break
    lines.feed(decoder.decode(b"", final=True))
    lines.close()


def _capacity(descriptor: int) -> int:
    """Return the number of bytes that a pipe holds."""
    return fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ) if hasattr(fcntl, "F_GETPIPE_SZ") else 2**20


class LastError:
    """The last lines that a worker has written to stderr.

    Example:
        >>> error = LastError()
        >>> for line in ("loading", "Traceback (most recent call last):", "ValueError: no"):
        ...     error.add(line)
        >>> error.lines()
        ['Traceback (most recent call last):', 'ValueError: no']
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)

    def add(self, line: str) -> None:
        """Add a line."""
        self._lines.append(line)

    def lines(self) -> list[str]:
        """Return the last traceback with those that it continues; without one, the last 20 lines."""
        lines = list(self._lines)
        starts = [number for number, line in enumerate(lines) if line.strip() == _TRACEBACK]
        if not starts:
            return lines[-_TAIL:]
        while len(starts) > 1 and _continues(lines[starts[-2] : starts[-1]]):
            starts.pop()
        return lines[starts[-1] :]

    @property
    def consequence(self) -> bool:
        """True if the error says only that another worker is gone, or if there is none."""
        lines = self.lines()
        return not lines or bool(_CONSEQUENCE.search("\n".join(lines)))


def _continues(lines: Sequence[str]) -> bool:
    return any(line.strip() in _CHAINED for line in lines[-3:])
