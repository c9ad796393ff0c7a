"""Gossip below the outer step: SGP, OSGP and D-PSGD (Assran et al. 2019, Lian et al. 2017).

After a base step each worker sends shares of its parameters to some others and adds up what comes. With z the
parameters that the model shows, x the numerators and w the push-sum weights, z = x / w:

    x   <- z_new + (x - x / w)          the base step, taken on z
    x_i <- p_ii x_i + sum_j p_ij x_j    and w likewise

With overlap (OSGP) the sum is over what was sent one step before. What a worker has sent and nobody has mixed yet it
keeps itself ("sent"): an average counts it there, and nobody waits for it, so that a state can be saved at any step.

The weights follow from the graph alone: every worker computes all of them. Where they never leave 1, x is z and is not
kept.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.handshake import agreed
from hvd_slowmo.core.layout import Chunk, Layout
from hvd_slowmo.core.ops import Ops
from hvd_slowmo.core.store import Store
from hvd_slowmo.topology.analysis import moves_weights
from hvd_slowmo.topology.checks import topology
from hvd_slowmo.topology.push_sum import carried_over, debiased, in_flight, mixed, mixed_late, parts


class Mass(NamedTuple):
    """Where all workers' weights are. m: number of workers."""

    w: Any  # float64 (m,): push-sum weights
    arriving: Any  # float64 (m,): weights on their way, by receiver
    flight: Any  # int64: 1 + the number of the step whose messages nobody has mixed yet; 0: there are none


class Graph:
    """The topology of a configuration, for m workers.

    Args:
        config: with a gossip base.
        size: m.
        nodes: the ranks of each node's workers, for gradients="node".

    Raises:
        TypeError, ValueError: as `hvd_slowmo.topology.topology`.
    """

    def __init__(self, config: SlowMoConfig, size: int, nodes: Sequence[Sequence[int]] | None = None) -> None:
        if config.gradients != "node" or size == 1:
            nodes = None
        self.array = topology(config.topology, size, symmetric=config.base == "dpsgd", nodes=nodes)
        self.overlap = config.overlap
        self.weighted = config.base == "sgp" and (config.overlap or moves_weights(self.array))
        self.size = size

    @property
    def digest(self) -> str:
        """Tells graphs apart, also those of functions with one name."""
        return hashlib.sha256(self.array.tobytes()).hexdigest()[:16]

    @property
    def vectors(self) -> tuple[str, ...]:
        """What is kept beside the model."""
        return (*(["push"] if self.weighted else []), *(["sent"] if self.overlap else []))


def agreed_graph(config: SlowMoConfig, comm: Comm, node: Comm | None, name: str) -> Graph:
    """The graph, the same on all workers, which have agreed on their settings. A collective of the node, then of all.

    Args:
        config: with a gossip base.
        comm: the workers.
        node: those of this worker's node, for gradients="node".
        name: prefix of the collectives' names.

    Raises:
        TypeError, ValueError: on every worker: one's topology can't be used, or two have different ones (functions of
            one name, say).
    """
    nodes: list[list[int]] | None = None
    if node is not None:
        mine = node.gather(f"{name}.node", comm.rank)
        nodes = [ranks for ranks, _ in itertools.groupby(sorted(comm.gather(f"{name}.nodes", mine)))]

    def make() -> tuple[Graph, dict[str, Any]]:
        graph = Graph(config, comm.size, nodes)
        return graph, {"topology (digest)": graph.digest}

    return agreed(comm, name, make, {})


class Gossip:
    """The mixing of one worker. block: elements to mix at once, see `Machine`; None: a chunk."""

    def __init__(
        self, graph: Graph, layout: Layout, ops: Ops, store: Store, comm: Comm, name: str, block: int | None = None
    ) -> None:
        self.graph = graph
        self._ops = ops
        self._store = store
        self._comm = comm
        self._name = name
        self._chunks = [chunk for chunk in layout.chunks if chunk.rule == "slow"]
        self._blocks = {chunk.index: tuple(chunk.blocks(block)) for chunk in self._chunks}
        self._parts = parts(graph.array)
        self._period = len(graph.array)
        self._departed: list[Any] | None = None  # collectives under way, where they can be kept between two steps
        self._recalled: list[Any] = []  # those whose result nobody wants any more

    def rest(self) -> Mass:
        """Every weight is 1 and nothing is on its way. Then x is z, whatever "push" holds: x - x / w is 0."""
        ones, zeros = [1.0] * self.graph.size, [0.0] * self.graph.size
        return Mass(self._ops.vector(ones), self._ops.vector(zeros), self._ops.integer(0.0))

    def mass(self, chunk: Chunk, mass: Mass) -> Any:
        """This worker's part of the sum over all workers and messages; the sum of the weights is m."""
        x = self._moved(chunk, mass)
        if not self.graph.overlap:
            return x
        kept, _ = self._of(mass.flight - 1)
        share = in_flight(kept[self._comm.rank, 0], 1.0)  # of what was sent

        def with_flight() -> Any:
            return x + self._store.read("sent", chunk) * self._ops.like(share, x)

        return self._ops.cond(mass.flight > 0, with_flight, lambda: x)

    def weight(self, mass: Mass) -> Any:
        """This worker's push-sum weight."""
        return mass.w[self._comm.rank]

    def keep(self, block: Chunk, z: Any, w: Any) -> None:
        """After an outer step of this worker's own, which has moved z: x follows."""
        if self.graph.weighted:
            self._store.write("push", block, z * self._ops.like(w, z))

    def depart(self, mass: Mass, delivers: Any) -> list[Any] | None:
        """Overlap: begin to send what the last step has set aside, if the coming one mixes it.

        Returns:
            Per chunk what came, once waited for, which can be given to `mix`; None where nothing travels ahead.
        """
        return self._delivered(mass, delivers) if self.graph.overlap else None

    def launch(self, mass: Mass, delivers: Any) -> None:
        """As `depart`, where a collective can be under way between two steps: it is waited for when it is mixed."""
        if self.graph.overlap and self._departed is None and mass.flight > 0 and delivers:
            self._departed = self._send(mass)

    def recall(self) -> None:
        """Another state takes the place of this one: what has departed is not mixed. Waits for nothing."""
        self._recalled += self._departed or []
        self._departed = None

    @property
    def under_way(self) -> bool:
        """Whether messages have been handed over whose result has not been taken, so that others must send theirs."""
        return bool(self._departed or self._recalled)

    def at_rest(self, mass: Mass) -> bool:
        """Whether all weights are 1 and nothing is on its way; not in a trace."""
        return not mass.flight and bool((mass.w == 1).all())

    def mix(self, mass: Mass, hop: Any, came: Sequence[Any] | None = None, onward: bool = False) -> Mass:
        """After a base step: mix with others.

        Args:
            mass: the weights before.
            hop: the number of this step, from the end of the warm-up.
            came: what `depart` has brought.
            onward: nothing follows in this step, and the next one mixes: with overlap, each message may leave as soon
                as it is set aside.
        """
        kept, sent = self._of(hop)
        w = self._ops.reshape(mass.w, (-1, 1))
        if self.graph.overlap:
            w, arriving = mixed_late(kept, sent, w, self._ops.reshape(mass.arriving, (-1, 1)))
            after = Mass(self._ops.reshape(w, (-1,)), self._ops.reshape(arriving, (-1,)), hop + 1)
            self._mix_late(mass, after, kept[self._comm.rank, 0], came, onward)
            return after
        after = mass._replace(w=self._ops.reshape(mixed(kept, sent, w), (-1,))) if self.graph.weighted else mass
        self._mix_now(mass, after, kept[self._comm.rank, 0], hop)
        return after

    def _mix_late(self, mass: Mass, after: Mass, kept: Any, came: Sequence[Any] | None, onward: bool) -> None:
        departed, self._departed = self._departed, None
        if departed is not None:
            arrivals: Iterator[Any] = map(self._comm.wait, departed)
        else:
            arrivals = iter(self._delivered(mass, True) if came is None else came)
        following = []
        for chunk in self._chunks:
            arrived = next(arrivals)  # waited for only now
            for block in self._blocks[chunk.index]:
                x = self._moved(block, mass)
                self._store.write("sent", block, x)
                self._show(block, x * self._ops.like(kept, x) + chunk.cut(arrived, block), after)
            if onward:
                following.append(self._set_out(chunk, after))
        if onward:
            self._departed = following

    def _delivered(self, mass: Mass, delivers: Any) -> list[Any]:
        """What comes of the last step's messages; zeros where there are none or the coming step mixes none."""

        def exchanged() -> list[Any]:
            return [self._comm.wait(handle) for handle in self._send(mass)]

        def nothing() -> list[Any]:
            return [self._store.read("sent", chunk) * 0 for chunk in self._chunks]

        return self._ops.cond((mass.flight > 0) & delivers, exchanged, nothing)

    def _send(self, mass: Mass) -> list[Any]:
        """Begin to send what the last step has set aside, all chunks of it."""
        return [self._set_out(chunk, mass) for chunk in self._chunks]

    def _set_out(self, chunk: Chunk, mass: Mass) -> Any:
        return self._push(chunk, self._store.read("sent", chunk), mass.flight - 1)

    def _mix_now(self, mass: Mass, after: Mass, kept: Any, hop: Any) -> None:
        def start(chunk: Chunk) -> tuple[Any, Any]:
            x = self._moved(chunk, mass)
            return self._push(chunk, x, hop), x

        following = start(self._chunks[0])
        for chunk, behind in zip(self._chunks, [*self._chunks[1:], None], strict=True):
            handle, x = following
            if behind is not None:
                following = start(behind)  # travels while this one is mixed
            arrived = self._comm.wait(handle)
            for block in self._blocks[chunk.index]:
                mine = chunk.cut(x, block)
                self._show(block, mine * self._ops.like(kept, x) + chunk.cut(arrived, block), after)

    def _show(self, chunk: Chunk, x: Any, after: Mass) -> None:
        if self.graph.weighted:
            self._store.write("push", chunk, x)
            x = debiased(x, self._ops.like(self.weight(after), x))
        self._store.write("model", chunk, x)

    def _moved(self, chunk: Chunk, mass: Mass) -> Any:
        """X after the base step that has moved the model."""
        z = self._store.read("model", chunk)
        if not self.graph.weighted:
            return z
        return carried_over(z, self._store.read("push", chunk), self._ops.like(self.weight(mass), z))

    def _push(self, chunk: Chunk, x: Any, hop: Any) -> Any:
        while self._recalled:  # their names are taken until then
            self._comm.wait(self._recalled.pop())
        _, sent = self._of(hop)
        return self._comm.start_push(f"{self._name}.push.{chunk.index}", x, sent[:, self._comm.rank])

    def _of(self, hop: Any) -> tuple[Any, Any]:
        at = hop % self._period
        return self._ops.at(self._parts.kept, at), self._ops.at(self._parts.sent, at)
