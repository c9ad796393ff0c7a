"""Progress of a training run, with the time left: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Progress over a known number of steps; rank 0 alone shows it.

    On a terminal it is a bar. Through horovodrun or into a file, where a bar that redraws itself would become one
    endless line, it is a line every few seconds; in a run of hours after every fiftieth of the time so far.

    Args:
        total: number of steps.
        rank: of this worker.
        stream: where to show it; sys.stderr by default, so that stdout holds the results alone.
        seconds: least time between two lines.
        clock: seconds; for tests.

    Example:
        >>> with Progress(3, stream=sys.stdout) as progress:
        ...     for step in range(3):
        ...         progress.update()
        1 of 3 steps, 33 %
        3 of 3 steps in 0:00
    """

    def __init__(
        self,
        total: int,
        rank: int = 0,
        *,
        stream: TextIO | None = None,
        seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._seconds = seconds
        self._clock = clock
        self._shown = rank == 0
        self._text = ""
        self._done = 0
        # When the first steps were done, and how many: they have waited for imports, connections and traces.
        self._first: tuple[float, int] | None = None
        self._begun = clock()
        self._next = self._begun
        self._bar: tqdm | None = None
        if self._shown and self._stream.isatty():
            self._bar = tqdm(total=total, unit="step", mininterval=0.5, file=self._stream, dynamic_ncols=True)

    def describe(self, text: str) -> None:
        """Say what is going on now, such as the method and its seed."""
        self._text = text
        if self._bar is not None:
            self._bar.set_description(text)

    def update(self, steps: int = 1) -> None:
        """Count steps."""
        self._done += steps
        self._first = self._first or (self._clock(), self._done)
        if self._bar is not None:
            self._bar.update(steps)
        elif self._shown and self._done < self._total:
            self._line()

    def skip(self, steps: int) -> None:
        """Count steps that an earlier run has taken; they say nothing about the time left."""
        self._done += steps
        if self._bar is not None:
            self._bar.initial += steps
            self._bar.n += steps
            self._bar.refresh()

    def close(self) -> None:
        """Show the end."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown:
            self._print(f"{self._done} of {self._total} steps in {duration(self._clock() - self._begun)}")

    def _line(self) -> None:
        now = self._clock()
        if now < self._next:
            return
        self._next = now + max(self._seconds, (now - self._begun) / 50)
        text = f"{self._text}: " if self._text else ""
        self._print(f"{text}{self._done} of {self._total} steps, {100 * self._done // self._total} %{self._left(now)}")

    def _left(self, now: float) -> str:
        """Return the time left in words, once there are steps beside the first ones."""
        if self._first is None or self._done == self._first[1]:
            return ""
        begun, done = self._first
        return f", {duration((now - begun) / (self._done - done) * (self._total - self._done))} left"

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Return a time as minutes and seconds, or hours, minutes and seconds.

    Example:
        >>> duration(65.4), duration(3725)
        ('1:05', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
