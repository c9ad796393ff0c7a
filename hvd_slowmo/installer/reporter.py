"""How the installer tells what it does; the command line prints it, the tests record it."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the installer's messages."""

    def say(self, text: str) -> None:
        """Take one line about what happens now."""

    def detail(self, line: str) -> None:
        """Take one line of a command's own output."""

    def progress(self, what: str, percent: int | None, seconds: float) -> None:
        """Take note that `what` has run for so many seconds and is so far (None: not known)."""

    def finish_progress(self) -> None:
        """Take note that the command whose progress was reported has ended."""
