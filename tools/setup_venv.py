"""Sets up the checkout's .venv for development; `make setup` runs it, and so does every other target first.

Stages: the virtual environment, the packages of requirements-dev.txt, the checkout itself (editable), Horovod. Each
leaves a stamp in .venv that holds a hash of all it depends on, so that a second call does nothing; a stage that failed
or was interrupted has no stamp, and it and those after it are run again. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup-stamp.json"
LOG = VENV / "setup.log"
UNFINISHED = VENV / "setup-unfinished"
OLDEST_PYTHON = (3, 10)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_INDEX_SECONDS = 4.0
ERRORS_SHOWN = 25


class SetupError(Exception):
    """A stage failed; the message says how, and what to do."""


@dataclass(frozen=True)
class Stage:
    """One step of the set-up.

    Attributes:
        name: its key in the stamp.
        title: what it does, for the user.
        inputs: files whose contents it depends on, besides the stages before it.
        run: does it.
    """

    name: str
    title: str
    inputs: tuple[Path, ...]
    run: Callable[[], None]


def stages() -> tuple[Stage, ...]:
    """Return the stages in their order."""
    installer = tuple(sorted((ROOT / "hvd_slowmo" / "installer").glob("*.py")))
    project = (ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "hvd_slowmo" / "version.py")
    return (
        Stage("venv", "creating .venv", (), create_venv),
        Stage("packages", "installing requirements-dev.txt", (ROOT / "requirements-dev.txt",), install_packages),
        Stage("project", "installing this checkout into .venv, editable", project, install_project),
        Stage("horovod", "installing Horovod (built once, then kept in your cache)", installer, install_horovod),
    )


def create_venv() -> None:
    """Make .venv, or complete one without a stamp; one of another Python or with half-installed packages is removed."""
    if VENV.exists() and (UNFINISHED.exists() or venv_version() != ".".join(map(str, sys.version_info[:3]))):
        shutil.rmtree(VENV)
    result = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SetupError(
            f"`python -m venv` failed:\n{(result.stdout + result.stderr).strip()}\n"
            "Cure: install Python's venv module (Debian, Ubuntu: `apt install python3-venv`), or name another Python: "
            "`make setup PYTHON=...`."
        )


def venv_version() -> str:
    """Return the version of the Python that made .venv, "" if it does not say."""
    try:
        lines = (VENV / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    settings = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
    return settings.get("version", "")


def install_packages() -> None:
    """Install the pinned packages, with PyTorch's CPU build where it can be had."""
    # Killed at the wrong moment, pip leaves a package that it later takes for whole; failing by itself, it cleans up.
    UNFINISHED.touch()
    arguments = ["install", "-r", "requirements-dev.txt"]
    if cpu_index_answers():
        arguments += ["--extra-index-url", CPU_INDEX]
        print(f"  PyTorch's CPU build comes from {CPU_INDEX}")
    else:
        print(
            f"  {CPU_INDEX} does not answer: PyTorch comes from pip's own indexes "
            "(on PyPI, for Linux, that is its CUDA build of several GB)"
        )
    try:
        run_logged([str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments])
    except SetupError:
        UNFINISHED.unlink()
        raise
    UNFINISHED.unlink()


def install_project() -> None:
    """Install the checkout, so that its packages and its command come from here."""
    arguments = ["install", "--no-deps", "--no-build-isolation", "--editable", "."]
    run_logged([str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments])


def install_horovod() -> None:
    """Let the project's own command build Horovod, or take it from the cache; it tells its progress itself."""
    sys.stdout.flush()
    if subprocess.run([str(VENV / "bin" / "hvd-slowmo"), "install-horovod"], cwd=ROOT, check=False).returncode != 0:
        raise SetupError("Horovod is not installed; see above for the cause and its cure.")


def cpu_index_answers() -> bool:
    """Return whether PyTorch's index of CPU wheels can be reached, within a few seconds."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=CPU_INDEX_SECONDS) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def run_logged(command: Sequence[str]) -> None:
    """Run a command with its output in the log.

    Raises:
        SetupError: it fails; the message holds its error lines, or the end of its output.
    """
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        start = log.tell()
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        with LOG.open(encoding="utf-8", errors="replace") as log:
            log.seek(start)
            lines = log.read().splitlines()
        errors = [line for line in lines if line.lower().startswith("error")] or lines
        raise SetupError(
            "\n".join(errors[-ERRORS_SHOWN:])
            + f"\nFull log: {LOG}\nCure: check the network and pip's settings (`pip config list`), then run again."
        )


def hashes(order: Sequence[Stage]) -> dict[str, str]:
    """Return each stage's hash: of the Python, of its own inputs, and of all stages before it."""
    base = json.dumps([sys.version, sysconfig.get_platform(), os.path.realpath(sys.executable), str(ROOT)])
    sha = hashlib.sha256(base.encode())
    result = {}
    for stage in order:
        sha.update(stage.name.encode())
        for path in stage.inputs:
            sha.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        result[stage.name] = sha.hexdigest()
    return result


def read_stamp() -> dict[str, str]:
    """Return the hashes of the finished stages; nothing where .venv is missing, broken, or not ours."""
    if not PYTHON.exists() or UNFINISHED.exists():
        return {}
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(done: dict[str, str]) -> None:
    """Write the hashes of the finished stages, whole or not at all."""
    incoming = STAMP.with_suffix(".incoming")
    incoming.write_text(json.dumps(done, indent=1), encoding="utf-8")
    incoming.replace(STAMP)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Wait until no other set-up of this checkout runs: two `make` at once must not write into one .venv."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up of this checkout is under way; waiting for it", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def set_up() -> None:
    """Run the stages whose stamp is missing or out of date, and all after them.

    Raises:
        SetupError: one fails.
    """
    order = stages()
    wanted = hashes(order)
    stamp = read_stamp()
    if stamp == wanted:
        return
    done: dict[str, str] = {}
    fresh = True
    for number, stage in enumerate(order, start=1):
        fresh = fresh and stamp.get(stage.name) == wanted[stage.name]
        if not fresh:
            print(f"[{number}/{len(order)}] {stage.title}", flush=True)
            started = time.monotonic()
            if done:
                write_stamp(done)  # without this stage and those after it: an interruption leaves no stamp of theirs
            stage.run()
            print(f"[{number}/{len(order)}] done in {time.monotonic() - started:.0f} s", flush=True)
        done[stage.name] = wanted[stage.name]
        if not fresh:
            write_stamp(done)


def main() -> int:
    """Set up .venv and return the exit status."""
    argparse.ArgumentParser(description="Sets up .venv for development; does nothing where that is done.").parse_args()
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        print(
            f"Python {version} is too old; name one of 3.10 or newer: `make setup PYTHON=python3.11`.", file=sys.stderr
        )
        return 1
    try:
        with only_one():
            set_up()
    except SetupError as error:
        print(f"Set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Set-up interrupted; the next call goes on from the last finished stage.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
