"""The subcommand `install-horovod`, and how its progress is printed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from hvd_slowmo.installer.cache import user_cache
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.install import install_horovod
from hvd_slowmo.installer.options import Options

if TYPE_CHECKING:
    from types import FrameType

_LINE_EVERY_SECONDS = 20.0


class Console:
    """A `Reporter` that prints: progress on one changing line of a terminal, else as a line every now and then.

    Args:
        verbose: print the output of the commands too.
    """

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._terminal = sys.stdout.isatty() and not verbose
        self._drawn = False
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Print one line."""
        self.finish_progress()
        print(text, flush=True)

    def detail(self, line: str) -> None:
        """Print a command's line, if asked to be verbose."""
        if self._verbose:
            print(line, flush=True)

    def progress(self, what: str, percent: int | None, seconds: float) -> None:
        """Redraw the progress line, or print one if the last is old enough."""
        share = "" if percent is None else f"{percent:3d} %, "
        text = f"  {what}: {share}{int(seconds) // 60} min {int(seconds) % 60:02d} s"
        if self._terminal:
            print(f"\r{text}\033[K", end="", flush=True)
            self._drawn = True
        elif seconds >= self._last_line + _LINE_EVERY_SECONDS:
            print(text, flush=True)
            self._last_line = seconds

    def finish_progress(self) -> None:
        """Take the progress line away."""
        if self._drawn:
            print("\r\033[K", end="", flush=True)
            self._drawn = False
        self._last_line = 0.0


def add_install_horovod(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `install-horovod` to the command line."""
    parser = commands.add_parser(
        "install-horovod",
        help="build Horovod for the frameworks installed here, install and try it",
        description="Builds Horovod for the PyTorch and TensorFlow of this environment (2 to 6 minutes; kept in the "
        "user's cache: nobody waits twice), installs it, and lets two workers sum a tensor with each framework. "
        "gloo is always built: it needs nothing else.",
    )
    parser.add_argument("--mpi", action="store_true", help="build MPI in as well")
    parser.add_argument(
        "--nccl",
        action="store_true",
        help="sum GPU tensors with NCCL (needs CUDA builds of the frameworks and the CUDA toolkit)",
    )
    parser.add_argument("--rebuild", action="store_true", help="build even if the cache has a wheel")
    parser.add_argument(
        "--jobs", type=_positive, metavar="N", help="compile N files at once (default: by processors and memory)"
    )
    parser.add_argument("--verbose", action="store_true", help="show the whole output of the build")
    parser.set_defaults(run=_install_horovod)


def _install_horovod(arguments: argparse.Namespace) -> int:
    # As an exception, SIGTERM passes through the places that end the build's processes and remove its folder.
    signal.signal(signal.SIGTERM, _terminate)
    options = Options(mpi=arguments.mpi, nccl=arguments.nccl, rebuild=arguments.rebuild, jobs=arguments.jobs)
    console = Console(arguments.verbose)
    started = time.monotonic()
    try:
        install_horovod(options, user_cache(os.environ), os.environ, console)
    except InstallError as error:
        console.finish_progress()
        print(f"hvd-slowmo install-horovod: {error}", file=sys.stderr)
        return 1
    console.say(f"Horovod is ready ({time.monotonic() - started:.0f} s)")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, and is {text}")
    return value


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
