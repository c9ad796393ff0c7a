"""pip of the running environment, quiet unless it fails."""

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
    """Runs pip for one environment.

    Attributes:
        log: file that takes pip's output.
        python: the environment's interpreter.
    """

    log: Path
    python: str = sys.executable

    def run(
        self,
        arguments: Sequence[str],
        reporter: Reporter,
        *,
        what: str,
        cure: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Run `pip <arguments>`.

        Raises:
            InstallError: pip fails; the message holds its own error lines, then `cure`.
        """
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        start = self.log.stat().st_size if self.log.exists() else 0
        status = process.run(command, self.log, reporter, what=what, env=env, cwd=cwd)
        if status != 0:
            raise InstallError(f"{what}: pip failed.\n{self._errors_since(start)}".rstrip(), cure, self.log)

    def _errors_since(self, start: int) -> str:
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            lines.seek(start)
            return "\n".join(line.rstrip() for line in lines if line.startswith("ERROR:"))


def require_usable_environment() -> None:
    """Check that pip can install into the running environment.

    Raises:
        InstallError: there is no pip, the environment is managed by the system, or it cannot be written to.
    """
    cure_venv = "create a virtual environment and work there: `python3 -m venv .venv && . .venv/bin/activate`."
    if importlib.util.find_spec("pip") is None:
        raise InstallError(
            f"The environment of {sys.executable} has no pip.",
            f"run `{sys.executable} -m ensurepip` (with uv: `uv pip install pip`) and try again.",
        )
    if sys.prefix != sys.base_prefix:
        return
    if Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        raise InstallError(
            f"The Python at {sys.prefix} is managed by the system, and pip may not install into it.", cure_venv
        )
    if not os.access(sysconfig.get_path("purelib"), os.W_OK) and not site.ENABLE_USER_SITE:
        raise InstallError(f"The folder {sysconfig.get_path('purelib')} cannot be written to by this user.", cure_venv)
