"""A mean in few bits, by two exchanges of bytes with error feedback.

Worker i has weight omega_i and a residual e_i: what rounding has withheld from the others so far. The workers share the
work of averaging: worker j takes the mean of slice j, and keeps the residual s_j of rounding it. Q: encode and decode.

    g_i = (anchor - x_i) + e_i                          Q(g_i) is sent, slice j to worker j
    R   = sum_i omega_i Q(g_i) / sum_i omega_i + s_j    of slice j, summed in the order of ranks
    Delta = Q(R)                                        sent to all, who decode the same bytes
    e_i <- g_i - Q(g_i)                                 s_j <- R - Q(R)

A residual is displacement that is owed, no momentum: it neither decays nor follows the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from hvd_slowmo.core import names
from hvd_slowmo.core.codec import BLOCK, Slices, payload_bytes, tiles
from hvd_slowmo.core.layout import Chunk
from hvd_slowmo.core.progress import Scalar
from hvd_slowmo.core.runtime import Runtime


class CodedChunk(NamedTuple):
    """The exchange of a chunk."""

    chunk: Chunk
    vector: str  # that is averaged: "model", or "in_flight"
    parts: Sequence[Any]  # the messages that this worker has sent, by receiver
    handle: Any  # of the phase under way
    received: Sequence[Any] = ()  # in the first phase, by sender
    rest: Any = None  # the new residual of this worker's slice, once the second phase has begun


class TwoPhase:
    """Means in few bits.

    Args:
        runtime: of this worker.

    Attributes:
        slice_residuals: s_j, by chunk; none where it is 0.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._ops, self._store, self._comm, self._codec = runtime.ops, runtime.store, runtime.comm, runtime.codec
        self._bits = runtime.config.bits
        self.slice_residuals: dict[int, Any] = {}
        self._parts: dict[tuple[int, int, int], Chunk] = {}

    def start(self, chunk: Chunk, vector: str, weight: Scalar) -> CodedChunk:
        """Start the first phase.

        Args:
            vector: that is averaged.
            weight: this worker's; where it is 0 it sends zeros.
        """
        slices = self._slices(chunk)

        def pieces(first: int, last: int) -> Iterator[Any]:
            if first == last:
                yield self._store.zeros(chunk)[:0] * 1  # of the right device
            for start, stop in tiles(self._codec, first, last):
                g = self._owed(chunk, vector, start, stop)
                yield self._ops.choose(weight == 0, partial(self._nothing, chunk, start, stop), g)

        spans = [slices.span(rank) for rank in range(self._comm.size)]
        parts = [self._codec.encode(pieces(first, last), last - first, self._bits) for first, last in spans]
        return CodedChunk(chunk, vector, parts, self._comm.start_alltoall(names.model(chunk.index), parts))

    def receive(self, coded: CodedChunk) -> CodedChunk:
        """Wait for the first phase."""
        return coded._replace(received=self._comm.wait(coded.handle))

    def relay(self, coded: CodedChunk, weights: Any, total: Scalar) -> CodedChunk:
        """Take the mean of this worker's slice, and start the second phase.

        Args:
            weights: of all workers, by rank.
            total: their sum.
        """
        slices, residual = self._slices(coded.chunk), self.slice_residuals.get(coded.chunk.index)
        blocks = slices.elements(self._comm.rank) // BLOCK
        mean = list(self._mean(coded, weights, total, residual, blocks)) or [self._store.zeros(coded.chunk)[:0] * 1]
        message = self._codec.encode(mean, blocks, self._bits)
        lengths = [payload_bytes(slices.elements(rank), self._bits) for rank in range(self._comm.size)]
        handle = self._comm.start_allgather(names.mean(coded.chunk.index), message, lengths)
        rests = [
            part - self._codec.decode(message, self._bits, *tile)
            for part, tile in zip(mean, tiles(self._codec, 0, blocks), strict=False)
        ]
        rest = self._ops.joined(rests or [self._store.zeros(coded.chunk)[:0] * 1])
        return coded._replace(handle=handle, received=(), rest=rest)

    def _mean(self, coded: CodedChunk, weights: Any, total: Scalar, residual: Any, blocks: int) -> Iterator[Any]:
        """Yield the tiles of this worker's slice of the mean, R."""
        for start, stop in tiles(self._codec, 0, blocks):
            mean = None
            for rank, message in enumerate(coded.received):
                values = self._codec.decode(message, self._bits, start, stop)
                part = values * self._ops.cast_like(weights[rank], values)
                mean = part if mean is None else mean + part
            mean = mean / self._ops.cast_like(total, mean)
            yield mean if residual is None else mean + residual[start * BLOCK : stop * BLOCK]

    def finish(self, coded: CodedChunk, weight: Scalar, finite: Scalar) -> Iterator[tuple[Chunk, Any]]:
        """Wait for the second phase, write the residuals, and yield parts of the chunk with the workers' mean.

        The mean is the anchor minus Delta. A part is used up before the next, while a core's cache holds it.

        Args:
            weight, finite: of this worker: what it owes stays where it weighs nothing, and is forgotten where its
                values were not finite.
        """
        chunk, store, ops = coded.chunk, self._store, self._ops
        slices, means = self._slices(chunk), self._comm.wait(coded.handle)
        self.slice_residuals[chunk.index] = coded.rest

        for rank in range(self._comm.size):
            begin, end = slices.span(rank)
            for start, stop in tiles(self._codec, begin, end):
                part, within = self._part(chunk, start, stop), (start - begin, stop - begin)
                sent = self._codec.decode(coded.parts[rank], self._bits, *within)
                owed = (self._owed(chunk, coded.vector, start, stop) - sent)[: part.size]
                residual = store.read("residual", part)
                owed = ops.choose(weight == 0, partial(_same, residual), owed)
                store.write("residual", part, ops.choose(finite == 0, partial(store.zeros, part), owed))
                delta = self._codec.decode(means[rank], self._bits, *within)[: part.size]
                yield part, store.read("anchor", part) - delta

    def _slices(self, chunk: Chunk) -> Slices:
        return Slices(chunk.size, self._comm.size)

    def _part(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        """Return these blocks of a chunk."""
        key = (chunk.index, start, stop)
        if key not in self._parts:
            begin, end = chunk.start + start * BLOCK, min(chunk.start + stop * BLOCK, chunk.stop)
            self._parts[key] = chunk.part(begin, end)
        return self._parts[key]

    def _owed(self, chunk: Chunk, vector: str, start: int, stop: int) -> Any:
        """Return these blocks of g."""
        store, part = self._store, self._part(chunk, start, stop)
        g = (store.read("anchor", part) - store.read(vector, part)) + store.read("residual", part)
        return self._codec.padded(g, (stop - start) * BLOCK)

    def _nothing(self, chunk: Chunk, start: int, stop: int) -> Any:
        """Return zeros in the place of these blocks, whatever the values are."""
        return self._codec.padded(self._store.zeros(self._part(chunk, start, stop)), (stop - start) * BLOCK)


def _same(x: Any) -> Any:
    return x
