"""The one exception of the installer."""

from __future__ import annotations

from pathlib import Path


class InstallError(Exception):
    """Something keeps Horovod from being built, installed or used.

    Args:
        cause: what is wrong, in one or two sentences.
        cure: what the user can do about it.
        log: file with the full output of the command that failed, if one was run.
    """

    def __init__(self, cause: str, cure: str, log: Path | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.cure = cure
        self.log = log

    def __str__(self) -> str:
        lines = [self.cause, f"Cure: {self.cure}"]
        if self.log is not None:
            lines.append(f"Full log: {self.log}")
        return "\n".join(lines)
