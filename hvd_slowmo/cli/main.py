"""The `hvd-slowmo` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from hvd_slowmo.cli.convert import add_convert
from hvd_slowmo.cli.doctor import add_doctor
from hvd_slowmo.cli.inspect import add_inspect
from hvd_slowmo.cli.install import add_install_horovod
from hvd_slowmo.cli.map import add_map
from hvd_slowmo.cli.topology import add_topology
from hvd_slowmo.version import __version__

# Each adds its subcommand and sets `run`, a function from the parsed arguments to the exit status.
_SUBCOMMANDS: tuple[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None], ...] = (
    add_install_horovod,
    add_doctor,
    add_topology,
    add_map,
    add_inspect,
    add_convert,
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    result = argparse.ArgumentParser(prog="hvd-slowmo", description="SlowMo and its relatives for Horovod.")
    result.add_argument("--version", action="version", version=f"hvd-slowmo {__version__}")
    commands = result.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _SUBCOMMANDS:
        add(commands)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; `arguments` are those of the process by default."""
    parsed = parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except KeyboardInterrupt:
        print("hvd-slowmo: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
