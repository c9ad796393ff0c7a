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

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core import names
from hvd_slowmo.core.codec import payload_bytes, tiles
from hvd_slowmo.core.layout import Chunk
from hvd_slowmo.core.progress import Scalar
from hvd_slowmo.core.runtime import Runtime
from hvd_slowmo.core.slices import BLOCK, Slices


class CodedChunk(NamedTuple):
    """The exchange of a chunk."""

    chunk: Chunk
    vector: str  # that is averaged: "model", or "in_flight"
    parts: Sequence[Any]  # the messages that this worker has sent, by receiver
    handle: Any  # of the phase under way; None: there is none
    received: Sequence[Any] = ()  # the messages of the phase that is over, by sender
    rest: Any = None  # the new residual of this worker's slice, once the second phase has begun


class TwoPhase:
    """Means in few bits.

    Args:
        runtime: of this worker.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._ops, self._store, self._codec = runtime.ops, runtime.store, runtime.codec
        self._bits = runtime.config.bits
        self._rank, self._size = runtime.comm.rank, runtime.comm.size
        self._parts: dict[tuple[int, int, int], Chunk] = {}

    def start(self, comm: ScopedComm, chunk: Chunk, vector: str, weight: Scalar) -> CodedChunk:
        """Start the first phase.

        Args:
            vector: that is averaged.
            weight: this worker's; where it is 0 it sends zeros.
        """
        slices = self._slices(chunk)

        def pieces(first: int, last: int) -> Iterator[Any]:
            if first == last:
                yield self._empty(chunk)
            for start, stop in tiles(self._codec, first, last):
                g = self._owed(chunk, vector, start, stop)
                yield self._ops.choose(weight == 0, partial(self._nothing, chunk, start, stop), g)

        spans = [slices.span(rank) for rank in range(self._size)]
        parts = [self._codec.encode(pieces(first, last), last - first, self._bits) for first, last in spans]
        return CodedChunk(chunk, vector, parts, comm.start_alltoall(names.model(chunk.index), parts))

    def arrived(self, comm: ScopedComm, coded: CodedChunk) -> CodedChunk:
        """Wait for the phase under way, if there is one."""
        return coded if coded.handle is None else coded._replace(handle=None, received=comm.wait(coded.handle))

    def relay(self, comm: ScopedComm, coded: CodedChunk, weights: Any, total: Scalar) -> CodedChunk:
        """Take the mean of this worker's slice, and start the second phase.

        Args:
            coded: whose first phase is over.
            weights: of all workers, by rank.
            total: their sum.
        """
        chunk, slices = coded.chunk, self._slices(coded.chunk)
        blocks = slices.elements(self._rank) // BLOCK
        mean = list(self._mean(coded, weights, total, blocks)) or [self._empty(chunk)]
        message = self._codec.encode(mean, blocks, self._bits)
        lengths = [payload_bytes(slices.elements(rank), self._bits) for rank in range(self._size)]
        handle = comm.start_allgather(names.mean(chunk.index), message, lengths)
        rests = [
            part - self._codec.decode(message, self._bits, *tile)
            for part, tile in zip(mean, tiles(self._codec, 0, blocks), strict=False)
        ]
        return coded._replace(handle=handle, received=(), rest=self._ops.joined(rests or [self._empty(chunk)]))

    def _mean(self, coded: CodedChunk, weights: Any, total: Scalar, blocks: int) -> Iterator[Any]:
        """Yield the tiles of this worker's slice of the mean, R."""
        residual = self._store.read_slice("slice_residual", coded.chunk.index)
        for start, stop in tiles(self._codec, 0, blocks):
            mean = None
            for rank, message in enumerate(coded.received):
                values = self._codec.decode(message, self._bits, start, stop)
                part = values * self._ops.cast_like(weights[rank], values)
                mean = part if mean is None else mean + part
            yield mean / self._ops.cast_like(total, mean) + residual[start * BLOCK : stop * BLOCK]

    def finish(self, coded: CodedChunk, weight: Scalar, finite: Scalar) -> Iterator[tuple[Chunk, Any]]:
        """Write the residuals, and yield parts of the chunk with the workers' mean: the anchor minus Delta.

        A part is used up before the next, while a core's cache holds it.

        Args:
            coded: whose second phase is over.
            weight, finite: of this worker: what it owes stays where it weighs nothing, and is forgotten where its
                values were not finite.
        """
        chunk, store, ops = coded.chunk, self._store, self._ops
        slices = self._slices(chunk)
        store.write_slice("slice_residual", chunk.index, coded.rest)

        for rank in range(self._size):
            begin, end = slices.span(rank)
            for start, stop in tiles(self._codec, begin, end):
                part, within = self._part(chunk, start, stop), (start - begin, stop - begin)
                sent = self._codec.decode(coded.parts[rank], self._bits, *within)
                owed = (self._owed(chunk, coded.vector, start, stop) - sent)[: part.size]
                residual = store.read("residual", part)
                owed = ops.choose(weight == 0, partial(_same, residual), owed)
                store.write("residual", part, ops.choose(finite == 0, partial(self._zeros, part), owed))
                delta = self._codec.decode(coded.received[rank], self._bits, *within)[: part.size]
                yield part, store.read("anchor", part) - delta

    def tensors(self, coded: CodedChunk) -> list[Any]:
        """Return the tensors of an exchange whose phases are over, for `from_tensors`."""
        return [self._ops.joined(coded.parts), self._ops.joined(coded.received), coded.rest]

    def nothing(self, chunk: Chunk) -> list[Any]:
        """Return as many tensors, which are empty."""
        empty = self._empty(chunk)
        return [self._codec.encode([empty], 0, self._bits)] * 2 + [empty]

    def from_tensors(self, chunk: Chunk, vector: str, sent: Any, received: Any, rest: Any) -> CodedChunk:
        """Return the exchange with these tensors."""
        slices, parts, means, start = self._slices(chunk), [], [], 0
        for rank in range(self._size):
            stop = start + payload_bytes(slices.elements(rank), self._bits)
            parts.append(sent[start:stop])
            means.append(received[start:stop])
            start = stop
        return CodedChunk(chunk, vector, parts, None, means, rest)

    def _slices(self, chunk: Chunk) -> Slices:
        return Slices(chunk.size, self._size)

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
        return self._codec.padded(self._zeros(self._part(chunk, start, stop)), (stop - start) * BLOCK)

    def _zeros(self, part: Chunk) -> Any:
        # The anchor is finite. Not the store's zeros, which lie in memory that another thread may use.
        return self._store.read("anchor", part) * 0

    def _empty(self, chunk: Chunk) -> Any:
        return self._store.read("anchor", chunk)[:0] * 1


def _same(x: Any) -> Any:
    return x
