"""The installer's exception."""

from __future__ import annotations

from pathlib import Path


class InstallError(Exception):
    """Error that prevents Horovod from being built, installed or used.

    Args:
        cause: the problem, in one or two sentences.
        fix: action for the user.
        log: file with the full output of the failed command, or None if no command was run.
    """

    def __init__(self, cause: str, fix: str, log: Path | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.fix = fix
        self.log = log

    def __str__(self) -> str:
        lines = [self.cause, f"Fix: {self.fix}"]
        if self.log is not None:
            lines.append(f"Full log: {self.log}")
        return "\n".join(lines)
