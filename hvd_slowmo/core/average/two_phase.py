"""A mean by two exchanges of bytes: in few bits with error feedback, or with the outer state divided among the workers.

The workers share the work of averaging: each takes the mean of a slice, and sends it to all. In few bits, worker i has
weight omega_i and a residual e_i: what rounding has withheld from the others so far. Worker j keeps the residual s_j of
rounding the mean of slice j. Q: encode and decode.

    g_i = (anchor - x_i) + e_i                          Q(g_i) is sent, slice j to worker j
    R   = sum_i omega_i Q(g_i) / sum_i omega_i          of slice j, summed in the order of ranks
    Delta = Q(R + s_j)                                  sent to all, who decode the same bytes
    e_i <- g_i - Q(g_i)                                 s_j <- R + s_j - Q(R + s_j)

A residual is displacement that is owed, no momentum: it neither decays nor follows the learning rate.

Where the outer state is divided, worker j takes the outer step of slice j in between. In few bits it sends the step of
the anchor, rounded in the same way, in the place of R; else x_i travels in the place of g_i, and then the new anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.parts import names
from hvd_slowmo.core.parts.codec import payload_bytes, tiles
from hvd_slowmo.core.parts.layout import ITEMSIZE, Chunk
from hvd_slowmo.core.parts.progress import Observed, Scalar
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.slices import BLOCK, Slices

OuterStep = Callable[[Chunk, Any, Any, Any], tuple[Any, Any]]
"""Takes an outer step: of a part of a chunk, the workers' mean, the anchor and v; returns the new anchor and v."""


class SlicedChunk(NamedTuple):
    """The exchange of a chunk."""

    chunk: Chunk
    values: Any  # the whole chunk as it was set aside; None: it is the model's
    parts: Sequence[Any]  # the messages that this worker has sent, by receiver
    handle: Any  # of the phase under way; None: there is none
    received: Sequence[Any] = ()  # the messages of the phase that is over, by sender
    relayed: bool = False  # the second phase has begun
    kept: Sequence[Any] = ()  # then, the new slices of the vectors that are kept in slices
    observed: Any = None  # then, `Observed` of this worker's slice as a vector; None where nothing is measured

    @property
    def all_tensors(self) -> list[Any]:
        """Those of an exchange that is over."""
        return [*self.parts, *self.received, *self.kept, *([] if self.observed is None else [self.observed])]

    def with_tensors(self, tensors: Iterator[Any]) -> SlicedChunk:
        """Return the same with other tensors, in the order of `all_tensors`."""
        parts, received, kept = ([next(tensors) for _ in each] for each in (self.parts, self.received, self.kept))
        observed = None if self.observed is None else next(tensors)
        return self._replace(parts=parts, received=received, kept=kept, observed=observed)


class TwoPhase:
    """Means, and outer steps where the outer state is divided, by two exchanges of bytes.

    Args:
        runtime: of this worker.

    Attributes:
        unanswered: by chunk, the new slices of an exchange whose second phase has begun and whose result has not come:
            if it never does, others may have it. Nothing in a trace.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.unanswered: dict[int, Sequence[Any]] = {}
        self._ops, self._store, self._codec = runtime.ops, runtime.store, runtime.codec
        self._config, self._layout, self._own = runtime.config, runtime.layout, runtime.slices
        self._few_bits = runtime.config.bits < 32
        self._observes = runtime.observe and runtime.config.shards
        self._rank, self._size = runtime.comm.rank, runtime.comm.size
        self._parts: dict[tuple[int, int, int], Chunk] = {}

    def start(self, comm: ScopedComm, chunk: Chunk, own: Any, weight: Scalar) -> SlicedChunk:
        """Start the first phase.

        Args:
            own: values of the whole chunk; None: the model's.
            weight: this worker's; where it is 0 it sends zeros.
        """
        slices = self._slices(chunk)

        def values(start: int, stop: int) -> Any:
            g = self._owed(chunk, own, start, stop)
            return self._ops.choose(weight == 0, partial(self._nothing, chunk, start, stop), g)

        whole = values(0, slices.blocks) if self._codec.tile is None else None

        def pieces(first: int, last: int) -> Iterator[Any]:
            for start, stop in tiles(self._codec, first, last):
                yield values(start, stop) if whole is None else whole[start * BLOCK : stop * BLOCK]

        bits, spans = self._bits(chunk), [slices.span(rank) for rank in range(self._size)]
        # With fewer blocks than workers most slices are empty: encoding each would take longer than the others.
        nothing = self._codec.encode([self._empty(chunk)], 0, bits) if slices.blocks < self._size else None
        parts = [
            nothing if first == last else self._codec.encode(pieces(first, last), last - first, bits)
            for first, last in spans
        ]
        handle = comm.start_alltoall(names.model(chunk.index), parts)
        return SlicedChunk(chunk, own, parts if self._few_bits else (), handle)

    def arrived(self, comm: ScopedComm, sliced: SlicedChunk) -> SlicedChunk:
        """Wait for the phase under way, if there is one."""
        if sliced.handle is None:
            return sliced
        return sliced._replace(handle=None, received=comm.wait(sliced.handle))

    def relay(
        self, comm: ScopedComm, sliced: SlicedChunk, weights: Any, total: Scalar, outer_step: OuterStep
    ) -> SlicedChunk:
        """Take the mean of this worker's slice, or its outer step, and start the second phase.

        Args:
            sliced: whose first phase is over.
            weights: of all workers, by rank.
            total: their sum.
            outer_step: of a slice.
        """
        chunk, bits = sliced.chunk, self._bits(sliced.chunk)
        self.unanswered.pop(chunk.index, None)
        blocks = self._own.lengths[chunk.index] // BLOCK
        values: Sequence[Any] = list(self._means(sliced, weights, total, blocks))
        kept: list[Any] = []
        observed = None
        if self._config.shards:
            values, kept, observed = self._stepped(sliced, weights, values, outer_step)
        values = values or [self._empty(chunk)]
        if self._few_bits:
            residual = self._store.read_slice("slice_residual", chunk.index)
            spans = list(tiles(self._codec, 0, blocks)) or [(0, 0)]
            values = [
                value + residual[start * BLOCK : stop * BLOCK]
                for value, (start, stop) in zip(values, spans, strict=True)
            ]
        message = self._codec.encode(values, blocks, bits)
        lengths = [payload_bytes(self._slices(chunk).elements(rank), bits) for rank in range(self._size)]
        handle = comm.start_allgather(names.mean(chunk.index), message, lengths)
        if self._few_bits:
            rests = [
                value - self._codec.decode(message, bits, start, stop)
                for value, (start, stop) in zip(values, spans, strict=True)
            ]
            kept.append(self._ops.joined(rests))
        if self._ops.keeps_handles:
            self.unanswered[chunk.index] = kept
        return sliced._replace(handle=handle, received=(), relayed=True, kept=kept, observed=observed)

    def _means(self, sliced: SlicedChunk, weights: Any, total: Scalar, blocks: int) -> Iterator[Any]:
        """Yield the tiles of the mean of this worker's slice."""
        bits = self._bits(sliced.chunk)
        for start, stop in tiles(self._codec, 0, blocks):
            mean = None
            for rank, message in enumerate(sliced.received):
                values = self._codec.decode(message, bits, start, stop)
                part = values * self._ops.cast_like(weights[rank], values)
                mean = part if mean is None else mean + part
            yield mean / self._ops.cast_like(total, mean)

    def _stepped(
        self, sliced: SlicedChunk, weights: Any, means: Sequence[Any], outer_step: OuterStep
    ) -> tuple[list[Any], list[Any], Any]:
        """Take the outer step of this worker's slice.

        Returns:
            The tiles that it sends; the new anchor and v; `SlicedChunk.observed`.
        """
        chunk, store, padded = sliced.chunk, self._store, self._codec.padded
        part = self._own.part(chunk)
        if part is None:
            nothing = self._ops.vector([0.0] * len(Observed._fields)) if self._observes else None
            return [], [self._empty(chunk)] * len({"anchor", "v"} & set(self._config.sliced_vectors)), nothing
        mean = self._ops.joined(means)[: part.size]
        length = self._own.lengths[chunk.index]
        if self._few_bits:
            before = store.read("anchor", part)
            mean = before - mean
        else:
            before = store.read_slice("anchor", chunk.index)[: part.size]
        # Copies: nothing is written before the verdict.
        v = store.read_slice("v", chunk.index)[: part.size] * 1 if self._config.beta else None
        observed = self._observed(sliced, weights, means, mean, before - mean, v) if self._observes else None
        anchor, v = outer_step(part, mean, before * 1, v)
        sent = padded(anchor - before if self._few_bits else anchor, length)
        kept = [] if self._few_bits else [sent]
        kept += [] if v is None else [padded(v, length)]
        spans = tiles(self._codec, 0, length // BLOCK)
        return [sent[start * BLOCK : stop * BLOCK] for start, stop in spans], kept, observed

    def _observed(self, sliced: SlicedChunk, weights: Any, means: Sequence[Any], mean: Any, delta: Any, v: Any) -> Any:
        """Return the measurements of this worker's slice as a vector; the drift is that of all workers.

        Args:
            weights: of all workers, by rank.
            means: the tiles of what has arrived; in few bits that is no parameters.
            mean: of the parameters.
        """
        dot, bits = self._ops.dot, self._bits(sliced.chunk)
        blocks = self._own.lengths[sliced.chunk.index] // BLOCK
        drift, counted = 0.0, self._ops.sum(self._ops.where(weights > 0, 1.0, 0.0))
        for tile, (start, stop) in zip(means, tiles(self._codec, 0, blocks), strict=True):
            for rank, message in enumerate(sliced.received):
                away = self._codec.decode(message, bits, start, stop) - tile
                drift = drift + self._ops.where(weights[rank] > 0, dot(away, away), 0.0)
        seen = Observed(
            drift=drift * self._size / self._ops.where(counted > 0, counted, 1.0),
            mean=dot(mean, mean),
            divergence=0.0,
            delta=dot(delta, delta),
            v=0.0 if v is None else dot(v, v),
            product=0.0 if v is None else dot(delta, v),
            residual=0.0,
            local=0.0,
        )
        return self._ops.vector(seen)

    def finish(self, sliced: SlicedChunk, weight: Scalar, finite: Scalar) -> Iterator[tuple[Chunk, Any]]:
        """Write what is kept, and yield parts of the chunk with the workers' mean, or with the new anchor.

        A part is used up before the next, while a core's cache holds it.

        Args:
            sliced: whose second phase is over.
            weight, finite: of this worker: what it owes stays where it weighs nothing, and is forgotten where its
                values were not finite.
        """
        chunk, store = sliced.chunk, self._store
        self.unanswered.pop(chunk.index, None)
        for name, value in zip(self._config.sliced_vectors, sliced.kept, strict=True):
            store.write_slice(name, chunk.index, value)

        for part, blocks, values_of in self._pieces(chunk):
            if self._few_bits:
                self._withhold(sliced, part, blocks, values_of(sliced.parts), weight, finite)
            value = values_of(sliced.received)[: part.size]
            if self._few_bits and self._config.shards:
                value = store.read("anchor", part) + value
                store.write("anchor", part, value)
            elif self._few_bits:
                value = store.read("anchor", part) - value
            yield part, value

    def _pieces(self, chunk: Chunk) -> Iterator[tuple[Chunk, tuple[int, int], Callable[[Sequence[Any]], Any]]]:
        """Yield the parts of a chunk in which it is worked on, their blocks, and a function that decodes messages."""
        bits, slices = self._bits(chunk), self._slices(chunk)
        if self._codec.tile is None:  # the fewest operations of a trace
            yield chunk, (0, slices.blocks), lambda messages: self._codec.decode_all(messages, bits)
            return
        for rank in range(self._size):
            begin, end = slices.span(rank)
            for start, stop in tiles(self._codec, begin, end):
                within = start - begin, stop - begin

                def values_of(messages: Sequence[Any], rank: int = rank, within: tuple[int, int] = within) -> Any:
                    return self._codec.decode(messages[rank], bits, *within)

                yield self._part(chunk, start, stop), (start, stop), values_of

    def _withhold(
        self, sliced: SlicedChunk, part: Chunk, blocks: tuple[int, int], sent: Any, weight: Scalar, finite: Scalar
    ) -> None:
        """Write a part of the residual: what has been sent is owed no more."""
        owed = (self._owed(sliced.chunk, sliced.values, *blocks) - sent)[: part.size]
        residual = self._store.read("residual", part)
        owed = self._ops.choose(weight == 0, lambda: residual, owed)
        zeros = partial(self._codec.padded, residual[:0], part.size)
        self._store.write("residual", part, self._ops.choose(finite == 0, zeros, owed))

    def tensors(self, sliced: SlicedChunk) -> list[Any]:
        """Return the tensors of an exchange whose phases are over, for `from_tensors`."""
        parts = sliced.parts or [self._codec.encode([self._empty(sliced.chunk)], 0, self._bits(sliced.chunk))]
        observed = [sliced.observed] if self._observes else []
        return [self._ops.joined(parts), self._ops.joined(sliced.received), *sliced.kept, *observed]

    def nothing(self, chunk: Chunk) -> list[Any]:
        """Return as many tensors, which are empty."""
        empty = self._empty(chunk)
        message = self._codec.encode([empty], 0, self._bits(chunk))
        observed = [self._ops.vector([0.0] * len(Observed._fields))] if self._observes else []
        return [message, message, *[empty] * len(self._config.sliced_vectors), *observed]

    @property
    def tensor_count(self) -> int:
        """Number of the tensors of `tensors`."""
        return 2 + len(self._config.sliced_vectors) + self._observes

    def from_tensors(self, chunk: Chunk, tensors: Iterator[Any]) -> SlicedChunk:
        """Take a late exchange's tensors and return it."""
        lengths = [payload_bytes(self._slices(chunk).elements(rank), self._bits(chunk)) for rank in range(self._size)]
        stops = list(accumulate(lengths))

        def cut(message: Any) -> list[Any]:
            whole = self._ops.reshape(message, (stops[-1],))  # a branch of a trace has forgotten the length
            return [whole[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]

        sent, received = next(tensors), next(tensors)
        own = (self._own.lengths[chunk.index],)
        kept = [self._ops.reshape(next(tensors), own) for _ in self._config.sliced_vectors]
        observed = self._ops.reshape(next(tensors), (len(Observed._fields),)) if self._observes else None
        values = self._store.read("in_flight", chunk)
        parts = cut(sent) if self._few_bits else ()
        return SlicedChunk(chunk, values, parts, None, cut(received), True, kept, observed)

    def _bits(self, chunk: Chunk) -> int:
        exact = 8 * ITEMSIZE[self._layout.segments[chunk.segment].dtype]
        return self._config.bits if self._few_bits else exact

    def _slices(self, chunk: Chunk) -> Slices:
        return Slices(chunk.size, self._size)

    def _part(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        """Return these blocks of a chunk."""
        key = (chunk.index, start, stop)
        if key not in self._parts:
            begin, end = chunk.start + start * BLOCK, min(chunk.start + stop * BLOCK, chunk.stop)
            self._parts[key] = chunk.part(begin, end)
        return self._parts[key]

    def _owed(self, chunk: Chunk, own: Any, start: int, stop: int) -> Any:
        """Return these blocks of what this worker sends: g in few bits, else its values."""
        store, part = self._store, self._part(chunk, start, stop)
        g = store.read("model", part) if own is None else own[part.start - chunk.start : part.stop - chunk.start]
        if self._few_bits:
            g = (store.read("anchor", part) - g) + store.read("residual", part)
        return self._codec.padded(g, (stop - start) * BLOCK)

    def _nothing(self, chunk: Chunk, start: int, stop: int) -> Any:
        """Return zeros in the place of these blocks, whatever the values are."""
        return self._codec.padded(self._empty(chunk), (stop - start) * BLOCK)

    def _empty(self, chunk: Chunk) -> Any:
        # Not of the store's zeros, which lie in memory that another thread may use.
        part = self._own.part(chunk) or chunk
        if self._few_bits:
            return self._store.read("anchor", part)[:0] * 1
        return self._store.read_slice("anchor", chunk.index)[:0] * 1
