"""The subcommand `topology`."""

from __future__ import annotations

import argparse

from hvd_slowmo.cli.arguments import refusals
from hvd_slowmo.errors import CommandError
from hvd_slowmo.topology.checks import consecutive_nodes, topology
from hvd_slowmo.topology.figure import describe, draw, title_of

_MOST_WORKERS = 2048
"""Its matrices take 34 MB each; the eigenvalues of larger ones take minutes."""


def add_topology(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `topology` to the command line."""
    parser = commands.add_parser(
        "topology",
        help="show a gossip topology, and how fast it brings the workers together",
        description="Shows a topology: the shares that the workers send to each other at each step of its period, its "
        "spectral gap, the steps to consensus, and the messages per worker and step.",
    )
    parser.add_argument("name", metavar="NAME", help="exponential, bipartite, complete, ring, full or star")
    parser.add_argument("-m", "--workers", type=int, required=True, metavar="N", help="number of workers")
    parser.add_argument(
        "--node-size", type=int, default=1, metavar="N", help="workers per node, where gradients are averaged in nodes"
    )
    parser.add_argument("--out", metavar="FILE", help="draw a figure into this file, .png, .svg or .pdf")
    parser.set_defaults(run=_topology)


def _topology(arguments: argparse.Namespace) -> int:
    if arguments.workers > _MOST_WORKERS:
        size = 8 * arguments.workers**2 / 1e9
        raise CommandError(
            f"each matrix for {arguments.workers} workers would take {size:.3g} GB: at most {_MOST_WORKERS} can "
            "be shown."
        )
    with refusals():
        nodes = consecutive_nodes(arguments.workers, arguments.node_size)
        array = topology(arguments.name, len(nodes))
        whole = topology(arguments.name, arguments.workers, nodes=nodes)
    print(describe(arguments.name, array, whole))
    if arguments.out:
        with refusals():
            draw(title_of(arguments.name, array, whole), whole, arguments.out)
        print(f"drawn into {arguments.out}")
    return 0
