"""Run pip in the running environment, without output unless it fails."""

from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd_slowmo.installer import process
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.reporter import Reporter


@dataclass(frozen=True)
class Pip:
    """pip of one environment.

    Attributes:
        log: file that receives pip's output.
        python: path of the environment's interpreter.
    """

    log: Path
    python: str = sys.executable

    def run(
        self,
        arguments: Sequence[str],
        reporter: Reporter,
        *,
        what: str,
        fix: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Run `pip <arguments>`.

        Args:
            arguments: subcommand and options.
            reporter: receives the progress.
            what: description of the action, such as "installing Horovod".
            fix: action for the user if pip fails.
            env: environment variables; None: those of this process.
            cwd: working directory; None: that of this process.

        Raises:
            InstallError: pip fails; the message has pip's error lines, then `fix`.
        """
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        start = self.log.stat().st_size if self.log.exists() else 0
        status = process.run(command, self.log, reporter, what=what, env=env, cwd=cwd)
        if status != 0:
            raise InstallError(f"{what}: pip failed.\n{self._errors_since(start)}".rstrip(), fix, self.log)

    def _errors_since(self, start: int) -> str:
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            lines.seek(start)
            return "\n".join(line.rstrip() for line in lines if line.startswith("ERROR:"))


def require_usable_environment() -> None:
    """Check that pip can install into the running environment.

    Raises:
        InstallError: pip is missing, or the environment is managed by the system or not writable.
    """
    use_venv = "create and activate a virtual environment: `python3 -m venv .venv && . .venv/bin/activate`."
    if importlib.util.find_spec("pip") is None:
        raise InstallError(
            f"The environment of {sys.executable} has no pip.",
            f"run `{sys.executable} -m ensurepip` (with uv: `uv pip install pip`) and try again.",
        )
    if sys.prefix != sys.base_prefix:
        return
    if Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        raise InstallError(
            f"The Python at {sys.prefix} is managed by the system, and pip may not install into it.", use_venv
        )
    if not os.access(sysconfig.get_path("purelib"), os.W_OK) and not site.ENABLE_USER_SITE:
        raise InstallError(f"The directory {sysconfig.get_path('purelib')} is not writable for this user.", use_venv)
