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

from collections.abc import Sequence
from typing import Any, NamedTuple

from hvd_slowmo.core import names
from hvd_slowmo.core.codec import BLOCK, Slices, payload_bytes
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

    def start(self, chunk: Chunk, vector: str, weight: Scalar) -> CodedChunk:
        """Start the first phase.

        Args:
            vector: that is averaged.
            weight: this worker's; where it is 0 it sends zeros.
        """
        slices = self._slices(chunk)
        g = self._ops.choose(weight == 0, lambda: self._nothing(chunk), self._owed(chunk, vector))
        spans = [slices.span(rank) for rank in range(self._comm.size)]
        parts = [self._codec.encode(g[first * BLOCK : last * BLOCK], self._bits) for first, last in spans]
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
        slices, mean = self._slices(coded.chunk), None
        for rank, message in enumerate(coded.received):
            values = self._codec.decode(message, self._bits)
            part = values * self._ops.cast_like(weights[rank], values)
            mean = part if mean is None else mean + part
        mean = mean / self._ops.cast_like(total, mean)
        if coded.chunk.index in self.slice_residuals:
            mean = mean + self.slice_residuals[coded.chunk.index]
        message = self._codec.encode(mean, self._bits)
        lengths = [payload_bytes(slices.elements(rank), self._bits) for rank in range(self._comm.size)]
        handle = self._comm.start_allgather(names.mean(coded.chunk.index), message, lengths)
        return coded._replace(handle=handle, received=(), rest=mean - self._codec.decode(message, self._bits))

    def finish(self, coded: CodedChunk, weight: Scalar, finite: Scalar) -> Any:
        """Wait for the second phase, write the residuals, and return the mean of the differences.

        Args:
            weight, finite: of this worker: what it owes stays where it weighs nothing, and is forgotten where its
                values were not finite.
        """
        chunk, store, ops = coded.chunk, self._store, self._ops
        means = self._comm.wait(coded.handle)
        self.slice_residuals[chunk.index] = coded.rest
        sent = self._ops.joined([self._codec.decode(part, self._bits) for part in coded.parts])
        owed = (self._owed(chunk, coded.vector) - sent)[: chunk.size]
        residual = ops.choose(weight == 0, lambda: store.read("residual", chunk), owed)
        store.write("residual", chunk, ops.choose(finite == 0, lambda: store.zeros(chunk), residual))
        return ops.joined([self._codec.decode(mean, self._bits) for mean in means])[: chunk.size]

    def _slices(self, chunk: Chunk) -> Slices:
        return Slices(chunk.size, self._comm.size)

    def _owed(self, chunk: Chunk, vector: str) -> Any:
        """Return g, filled up to whole blocks."""
        store = self._store
        g = (store.read("anchor", chunk) - store.read(vector, chunk)) + store.read("residual", chunk)
        return self._codec.padded(g, self._slices(chunk).blocks * BLOCK)

    def _nothing(self, chunk: Chunk) -> Any:
        return self._codec.padded(self._store.zeros(chunk), self._slices(chunk).blocks * BLOCK)
