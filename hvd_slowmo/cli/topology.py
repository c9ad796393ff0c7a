"""The subcommand `topology`."""

from __future__ import annotations

import argparse
import sys


def add_topology(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `topology` to the command line."""
    parser = commands.add_parser(
        "topology",
        help="show who sends to whom over a gossip base, and how fast the workers come together",
        description="Shows a topology: who sends what share to whom at each step of its period, its spectral gap, the "
        "steps to consensus, and the messages per worker and step.",
    )
    parser.add_argument("name", metavar="NAME", help="exponential, bipartite, complete, ring, full or star")
    parser.add_argument("-m", "--workers", type=int, required=True, metavar="N", help="how many workers")
    parser.add_argument(
        "--node-size", type=int, default=1, metavar="N", help="workers per node, where gradients are averaged in nodes"
    )
    parser.add_argument("--out", metavar="FILE", help="draw a picture into this file, .png, .svg or .pdf")
    parser.set_defaults(run=_topology)


def _topology(arguments: argparse.Namespace) -> int:
    # Imported here, as the other commands must run where NumPy is not installed: `doctor` says so.
    from hvd_slowmo.topology.checks import consecutive_nodes, topology
    from hvd_slowmo.topology.figure import describe, draw, title_of

    try:
        nodes = consecutive_nodes(arguments.workers, arguments.node_size)
        array = topology(arguments.name, len(nodes))
        whole = topology(arguments.name, arguments.workers, nodes=nodes)
        print(describe(arguments.name, array, whole))
        if arguments.out:
            draw(title_of(arguments.name, array, whole), whole, arguments.out)
            print(f"drawn into {arguments.out}")
    except (ImportError, OSError, ValueError) as error:
        print(f"hvd-slowmo topology: {error}", file=sys.stderr)
        return 1
    return 0
