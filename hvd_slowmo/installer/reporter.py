"""Interface for the installer's messages, which the command line prints and the tests record."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receiver of the installer's messages."""

    def say(self, text: str) -> None:
        """Report the current action in one line."""

    def detail(self, line: str) -> None:
        """Report one line of a command's output."""

    def progress(self, what: str, percent: int | None, seconds: float, note: str = "") -> None:
        """Report the progress of a running command.

        Args:
            what: description of the action.
            percent: completed share, 0 to 100; None if unknown.
            seconds: elapsed time.
            note: time left and current file, in words.
        """

    def finish_progress(self) -> None:
        """Report the end of the running command."""
