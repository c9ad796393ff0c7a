"""Mixing of parameters between outer steps: none, or gossip (SGP, OSGP and D-PSGD).

With gossip each worker sends shares of its parameters to some others after an inner step, and adds up the messages that
it receives. With z the parameters that the model shows, x the numerators and w the push-sum weights, z = x / w
(Assran et al. 2019, Algorithm 1; Lian et al. 2017):

    x   <- z_new + (x - x / w)          the inner step, taken on z
    x_i <- p_ii x_i + sum_j p_ij x_j    and w likewise

With overlap (OSGP) the sum is over the messages of one step before. A worker keeps its messages until they have been
mixed ("sent"): an average counts them there, and nobody waits for them, so a state can be saved at any step.

The weights follow from the graph alone: every worker computes all of them. Where they never leave 1, x is z and is not
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

from hvd_slowmo.core.parts import names
from hvd_slowmo.core.parts.layout import Chunk, Stretch, Tile
from hvd_slowmo.core.parts.progress import PushSum, Scalar
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.topology.push_sum import carried_share, in_flight, mixed, mixed_late, parts

Once = Callable[[Scalar, PushSum], PushSum]
"""The mixing of one step, given its number."""


class Mixing(Protocol):
    """One worker's mixing between outer steps."""

    equal_weights: bool
    """True if every worker weighs 1 in an average; otherwise it weighs its own steps since the last one / tau."""

    def initial(self) -> PushSum:
        """Return the state at rest: every weight is 1 and no message is in flight."""

    def at_rest(self, state: PushSum) -> bool:
        """Return whether the state is `initial()`; not in a trace."""

    def contribution(self, chunk: Chunk, state: PushSum) -> Any:
        """Return this worker's part of the sum over all workers and messages; the sum of the weights is m."""

    def mix(self, state: PushSum, hop: Scalar, arrivals: Sequence[Any] | None, send_at_once: Scalar) -> PushSum:
        """Mix with others after an inner step.

        Args:
            state: before.
            hop: number of this step, from the end of the warm-up.
            arrivals: result of `exchange_pending`.
            send_at_once: nothing follows in this step, and the next one mixes: with overlap, each message may leave as
                soon as it is set aside.
        """

    def exchange_pending(self, state: PushSum, mixes: Scalar) -> Sequence[Any] | None:
        """With overlap: exchange the messages of the last step, if the coming one mixes them.

        Returns:
            Per chunk the messages received, which can be given to `mix`; None where nothing travels ahead.
        """

    def send_ahead(self, state: PushSum, mixes: Scalar) -> None:
        """Start what `exchange_pending` does where a collective can be in flight between two steps."""

    def discard_in_flight(self) -> None:
        """Never mix the messages in flight: another state takes the place of this one. Waits for nothing."""

    def abandon(self) -> None:
        """Wait for the messages that were given up, failed or not: other workers take the place of these."""

    @property
    def in_flight(self) -> bool:
        """True while messages have been started whose result has not been taken, so that others must send theirs."""

    def follow_outer_step(self, tile: Tile, z: Any, state: PushSum) -> None:
        """Let the numerators follow an outer step of this worker alone, which has moved z."""

    def repeat(self, state: PushSum, first: Scalar, stop: Scalar, once: Once) -> PushSum:
        """Take part in the others' mixing at steps first .. stop - 1; `once(step, state)` is the mixing of a step."""


class NoMixing:
    """Workers keep to themselves between outer steps."""

    equal_weights = False
    in_flight = False

    def __init__(self, runtime: Runtime) -> None:
        self._ops = runtime.ops
        self._store = runtime.store

    def initial(self) -> PushSum:
        nothing = self._ops.vector([])
        return PushSum(nothing, nothing, self._ops.to_int(0.0))

    def at_rest(self, state: PushSum) -> bool:
        return True

    def contribution(self, chunk: Chunk, state: PushSum) -> Any:
        return self._store.read("model", chunk)

    def mix(self, state: PushSum, hop: Scalar, arrivals: Sequence[Any] | None, send_at_once: Scalar) -> PushSum:
        return state

    def exchange_pending(self, state: PushSum, mixes: Scalar) -> None:
        return None

    def send_ahead(self, state: PushSum, mixes: Scalar) -> None:
        pass

    def discard_in_flight(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def follow_outer_step(self, tile: Tile, z: Any, state: PushSum) -> None:
        pass

    def repeat(self, state: PushSum, first: Scalar, stop: Scalar, once: Once) -> PushSum:
        return state


class Gossip:
    """Messages to some workers after every step."""

    equal_weights = True  # mixing has spread the steps already

    def __init__(self, graph: Graph, runtime: Runtime) -> None:
        self._graph = graph
        self._ops = runtime.ops
        self._store = runtime.store
        self._comm = runtime.comm
        # Of a stack, the weights of all workers: a tensor's last axis is theirs.
        self._own: int | slice = slice(None) if runtime.stacked else runtime.comm.rank
        self._chunks = runtime.layout.parameter_chunks
        self._kernels = runtime.kernels
        self._tiles = {chunk.index: tuple(chunk.tiles(runtime.kernels.tile)) for chunk in self._chunks}
        shares = parts(graph.array)
        self._kept, self._sent = shares.kept, runtime.ops.matrices(shares.sent)
        self._period = len(graph.array)
        self._handles: list[Any] | None = None  # messages in flight, where they can be kept between two steps
        self._discarded: list[Any] = []

    def initial(self) -> PushSum:
        ones, zeros = [1.0] * self._graph.size, [0.0] * self._graph.size
        return PushSum(self._ops.vector(ones), self._ops.vector(zeros), self._ops.to_int(0.0))

    def at_rest(self, state: PushSum) -> bool:
        return not state.in_flight and bool((state.weights == 1).all())

    def contribution(self, chunk: Chunk, state: PushSum) -> Any:
        x = self._numerator(chunk, state)
        if not self._graph.overlap:
            return x
        kept, _ = self._shares(state.in_flight - 1)
        share = in_flight(kept[self._own, 0], 1.0)  # of the vector that was sent

        def with_messages() -> Any:
            return self._scaled_sum(self._store.read("sent", chunk), share, x, lambda: x)

        return self._ops.cond(state.in_flight > 0, with_messages, lambda: x)

    def follow_outer_step(self, tile: Tile, z: Any, state: PushSum) -> None:
        if self._graph.weighted:
            self._store.write("push", tile, z * self._ops.cast_like(self._weight(state), z))

    def exchange_pending(self, state: PushSum, mixes: Scalar) -> list[Any] | None:
        return self._exchanged(state, mixes) if self._graph.overlap else None

    def send_ahead(self, state: PushSum, mixes: Scalar) -> None:
        if self._graph.overlap and self._handles is None and state.in_flight > 0 and mixes:
            self._handles = self._send(state)

    def discard_in_flight(self) -> None:
        self._discarded += self._handles or []
        self._handles = None

    def abandon(self) -> None:
        while self._discarded:
            with suppress(Exception):  # a worker was lost
                self._comm.wait(self._discarded.pop())

    @property
    def in_flight(self) -> bool:
        return bool(self._handles or self._discarded)

    def mix(self, state: PushSum, hop: Scalar, arrivals: Sequence[Any] | None, send_at_once: Scalar) -> PushSum:
        kept, sent = self._shares(hop)
        w = self._ops.reshape(state.weights, (-1, 1))
        if self._graph.overlap:
            w, arriving = mixed_late(kept, sent, w, self._ops.reshape(state.arriving, (-1, 1)))
            after = PushSum(self._ops.reshape(w, (-1,)), self._ops.reshape(arriving, (-1,)), hop + 1)
            self._mix_late(state, after, kept[self._own, 0], arrivals, send_at_once)
            return after
        after = state
        if self._graph.weighted:
            after = state._replace(weights=self._ops.reshape(mixed(kept, sent, w), (-1,)))
        self._mix_now(state, after, kept[self._own, 0], hop)
        return after

    def repeat(self, state: PushSum, first: Scalar, stop: Scalar, once: Once) -> PushSum:
        def body(step: Scalar, state: PushSum) -> tuple[Scalar, PushSum]:
            return step + 1, once(step, state)

        _, state = self._ops.loop(lambda step, _: step < stop, body, (first, state))
        return state

    def _mix_late(
        self, state: PushSum, after: PushSum, kept: Scalar, arrivals: Sequence[Any] | None, send_at_once: Scalar
    ) -> None:
        handles, self._handles = self._handles, None
        if handles is not None:
            received: Iterator[Any] = map(self._comm.wait, handles)
        else:
            received = iter(self._exchanged(state, True) if arrivals is None else arrivals)
        following = []
        for chunk in self._chunks:
            arrived = next(received)  # waited for only now
            for tile in self._tiles[chunk.index]:
                self._mix_tile_late(tile, chunk.cut(arrived, tile), state, after, kept)
            if send_at_once:
                following.append(self._send_chunk(chunk, after))
        if send_at_once:
            self._handles = following

    def _mix_tile_late(self, tile: Tile, arrived: Any, state: PushSum, after: PushSum, kept: Scalar) -> None:
        z = self._store.read("model", tile)
        x = self._carry(tile, z, state, lambda: self._store.read("sent", tile))
        self._store.write("sent", tile, x)
        self._show(tile, self._scaled_sum(x, kept, arrived, lambda: z), after)

    def _exchanged(self, state: PushSum, mixes: Scalar) -> list[Any]:
        """Exchange the last step's messages; zeros where there are none or the coming step mixes none."""

        def exchange() -> list[Any]:
            return [self._comm.wait(handle) for handle in self._send(state)]

        def nothing() -> list[Any]:
            return [self._store.read("sent", chunk) * 0 for chunk in self._chunks]

        return self._ops.cond((state.in_flight > 0) & mixes, exchange, nothing)

    def _send(self, state: PushSum) -> list[Any]:
        """Start to send the vector that the last step has set aside, all chunks of it."""
        return [self._send_chunk(chunk, state) for chunk in self._chunks]

    def _send_chunk(self, chunk: Chunk, state: PushSum) -> Any:
        return self._push(chunk, self._store.read("sent", chunk), state.in_flight - 1)

    def _mix_now(self, state: PushSum, after: PushSum, kept: Scalar, hop: Scalar) -> None:
        def start(chunk: Chunk) -> tuple[Any, Any]:
            x = self._numerator(chunk, state)
            return self._push(chunk, x, hop), x

        following = start(self._chunks[0])
        for chunk, behind in zip(self._chunks, [*self._chunks[1:], None], strict=True):
            handle, x = following
            if behind is not None:
                following = start(behind)  # travels while this one is mixed
            arrived = self._comm.wait(handle)
            for tile in self._tiles[chunk.index]:
                self._show(tile, self._scaled_sum(chunk.cut(x, tile), kept, chunk.cut(arrived, tile)), after)

    def _show(self, tile: Tile, x: Any, after: PushSum) -> None:
        """Set the numerators, whose memory may be used then, and the model to z = x / w."""
        if self._graph.weighted:
            self._store.write("push", tile, x)
            x = self._kernels.divide(x, self._ops.cast_like(self._weight(after), x))
        self._store.write("model", tile, x)

    def _numerator(self, stretch: Stretch, state: PushSum) -> Any:
        """Return x after the inner step that has moved the model."""
        z = self._store.read("model", stretch)
        return self._carry(stretch, z, state, lambda: z)

    def _carry(self, stretch: Stretch, z: Any, state: PushSum, memory: Callable[[], Any]) -> Any:
        if not self._graph.weighted:
            return z
        share = carried_share(self._weight(state))
        return self._scaled_sum(self._store.read("push", stretch), share, z, memory)

    def _scaled_sum(self, x: Any, factor: Scalar, y: Any, memory: Callable[[], Any] | None = None) -> Any:
        """Return x * factor + y, in the memory given or in that of x, where a framework does so."""
        return self._kernels.scaled_sum(x, self._ops.cast_like(factor, x), y, memory or (lambda: x))

    def _weight(self, state: PushSum) -> Scalar:
        return state.weights[self._own]

    def _push(self, chunk: Chunk, x: Any, hop: Scalar) -> Any:
        while self._discarded:  # their names are taken until then
            self._comm.wait(self._discarded.pop())
        _, sent = self._shares(hop)
        return self._comm.start_push(names.push(chunk.index), x, sent)

    def _shares(self, hop: Scalar) -> tuple[Any, Any]:
        at = hop % self._period
        return self._ops.take(self._kept, at), self._ops.take(self._sent, at)


def mixing_of(graph: Graph | None, runtime: Runtime) -> Mixing:
    """Return the mixing over a graph; none where there is no graph."""
    return NoMixing(runtime) if graph is None else Gossip(graph, runtime)
