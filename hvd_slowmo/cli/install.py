"""The subcommand `install-horovod`."""

from __future__ import annotations

import argparse
import os
import signal
import time
from types import FrameType
from typing import NoReturn

from hvd_slowmo.cli.arguments import at_least, refusals
from hvd_slowmo.cli.console import Console
from hvd_slowmo.installer.cache import user_cache
from hvd_slowmo.installer.install import install_horovod
from hvd_slowmo.installer.options import Options


def add_install_horovod(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `install-horovod` to the command line."""
    parser = commands.add_parser(
        "install-horovod",
        help="build, install and verify Horovod for the installed frameworks",
        description="Build Horovod for the PyTorch and TensorFlow of this environment (some minutes, once: the wheel "
        "is kept in the user's cache), install it, and sum a tensor over two workers with each framework. gloo is "
        "always included, because it has no requirements.",
    )
    parser.add_argument("--mpi", action="store_true", help="build with MPI as well")
    parser.add_argument(
        "--nccl",
        action="store_true",
        help="sum GPU tensors with NCCL (needs CUDA builds of the frameworks and the CUDA toolkit)",
    )
    parser.add_argument("--rebuild", action="store_true", help="build even if the cache has a wheel")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        metavar="N",
        help="compile N files at once (default: as many as processors and memory allow)",
    )
    parser.add_argument("--verbose", action="store_true", help="show the full output of the build")
    parser.set_defaults(run=_install_horovod)


def _install_horovod(arguments: argparse.Namespace) -> int:
    # Converted into an exception, SIGTERM unwinds the code that stops the build's processes and removes its directory.
    signal.signal(signal.SIGTERM, _terminate)
    with refusals():
        options = Options(mpi=arguments.mpi, nccl=arguments.nccl, rebuild=arguments.rebuild, jobs=arguments.jobs)
    started = time.monotonic()
    with Console(arguments.verbose) as console:
        install_horovod(options, user_cache(os.environ), os.environ, console)
        console.say(f"Horovod is ready ({time.monotonic() - started:.0f} s)")
    return 0


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
