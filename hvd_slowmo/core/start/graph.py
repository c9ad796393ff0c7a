"""The gossip graph of a job: a configuration's topology for its workers, on which all of them agree at the start."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.start.handshake import agreed
from hvd_slowmo.gossip import DPSGD, SGP
from hvd_slowmo.topology.analysis import moves_weights
from hvd_slowmo.topology.checks import topology


class Graph:
    """The topology of a configuration with gossip, for m workers.

    Args:
        config: with gossip.
        size: m.
        nodes: the ranks of each node's workers, for gradients="node".

    Attributes:
        array: float64 (period, m, m), see `hvd_slowmo.topology.graphs`.
        overlap: messages are mixed one step late.
        weighted: push-sum weights leave 1, so that the numerators are kept.

    Raises:
        TypeError, ValueError: as `hvd_slowmo.topology.checks.topology`.

    Example:
        >>> Graph(SlowMoConfig.osgp(), 4).vectors
        ('push', 'sent')
    """

    def __init__(self, config: SlowMoConfig, size: int, nodes: Sequence[Sequence[int]] | None = None) -> None:
        gossip = config.gossip
        assert gossip is not None, "a graph is made with gossip only"
        if config.gradients != "node" or size == 1:
            nodes = None
        self.array = topology(gossip.topology, size, symmetric=isinstance(gossip, DPSGD), nodes=nodes)
        self.overlap = isinstance(gossip, SGP) and gossip.overlap
        self.weighted = isinstance(gossip, SGP) and (self.overlap or moves_weights(self.array))
        self.size = size

    @property
    def digest(self) -> str:
        """Digest of the array: tells graphs apart, also those of functions with one name."""
        return hashlib.sha256(self.array.tobytes()).hexdigest()[:16]

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the vectors that are kept beside the model."""
        return (*(["push"] if self.weighted else []), *(["sent"] if self.overlap else []))


def agreed_graph(config: SlowMoConfig, comm: ScopedComm) -> Graph | None:
    """Return the graph, the same on all workers, which have agreed on their settings; None without gossip.

    A collective of the node's workers (with gradients="node"), then of all.

    Raises:
        TypeError, ValueError: on every worker: one's topology can't be used, or two have different ones (functions of
            one name, say).
    """
    if config.gossip is None:
        return None
    nodes: list[list[int]] | None = None
    if comm.node is not None:
        ranks = comm.node.gather("node", comm.rank)
        nodes = [node for node, _ in itertools.groupby(sorted(comm.gather("nodes", ranks)))]

    def make() -> tuple[Graph, dict[str, Any]]:
        graph = Graph(config, comm.size, nodes)
        return graph, {"topology (digest)": graph.digest}

    return agreed(comm, make, {})
