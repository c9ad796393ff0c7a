"""The `hvd-slowmo` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from hvd_slowmo.cli.advise import add_advise
from hvd_slowmo.cli.convert import add_convert
from hvd_slowmo.cli.doctor import add_doctor
from hvd_slowmo.cli.inspect import add_inspect
from hvd_slowmo.cli.install import add_install_horovod
from hvd_slowmo.cli.map import add_map
from hvd_slowmo.cli.run import add_run
from hvd_slowmo.cli.simulate import add_simulate
from hvd_slowmo.cli.topology import add_topology
from hvd_slowmo.errors import CheckpointError, CommandError, escape_controls
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.version import __version__

# Each adds its subcommand and sets `run`, a function from the parsed arguments to the exit status.
_SUBCOMMANDS: tuple[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None], ...] = (
    add_install_horovod,
    add_doctor,
    add_run,
    add_topology,
    add_simulate,
    add_advise,
    add_map,
    add_inspect,
    add_convert,
)

_DOCUMENTED = (CheckpointError, CommandError, InstallError, ImportError, OSError)
"""Errors of the library and of the system whose message is enough for a user. Any other is a bug, with a traceback."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line.

    Example:
        >>> parser().parse_args(["topology", "ring", "-m", "4"]).workers
        4
    """
    result = argparse.ArgumentParser(prog="hvd-slowmo", description="SlowMo and its relatives for Horovod.")
    result.add_argument("--version", action="version", version=f"hvd-slowmo {__version__}")
    commands = result.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for add in _SUBCOMMANDS:
        add(commands)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: None for those of the process.

    Example:
        >>> main(["topology", "ring", "-m", "1"])  # doctest: +ELLIPSIS
        ring, 1 worker, period 1
        ...
        0
    """
    parsed = argparse.Namespace(command="")
    try:
        try:
            parser().parse_args(arguments, parsed)
            status: int = parsed.run(parsed)
        finally:
            sys.stdout.flush()  # of --help too: an error at Python's own end would be a traceback
    except KeyboardInterrupt:
        print("hvd-slowmo: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of the output has ended, `head` for instance
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + signal.SIGPIPE
    except _DOCUMENTED as error:
        print(escape_controls(f"hvd-slowmo {parsed.command}: {error}"), file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
