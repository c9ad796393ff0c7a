"""The mean of a chunk over the workers, in the way that the settings choose: a sum, or two exchanges of slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.average.exchange import Exchange, Purpose
from hvd_slowmo.core.average.ledger import columns
from hvd_slowmo.core.average.mixing import Mixing
from hvd_slowmo.core.average.tile_step import slice_step
from hvd_slowmo.core.average.two_phase import SlicedChunk, TwoPhase
from hvd_slowmo.core.parts import names
from hvd_slowmo.core.parts.layout import Chunk
from hvd_slowmo.core.parts.progress import Scalar
from hvd_slowmo.core.parts.runtime import Runtime


class ChunkMeans:
    """The exchanges of one worker's chunks.

    Args:
        runtime: of this worker.
        mixing: of this worker.

    Attributes:
        unanswered: see `hvd_slowmo.core.average.two_phase.TwoPhase`.
    """

    def __init__(self, runtime: Runtime, mixing: Mixing) -> None:
        self._runtime = runtime
        self._layout, self._ops, self._store = runtime.layout, runtime.ops, runtime.store
        self._mixing = mixing
        self._two_phase = TwoPhase(runtime)
        self.unanswered = self._two_phase.unanswered

    def start(self, comm: ScopedComm, chunk: Chunk, exchange: Exchange, fits: Scalar, own: Any = None) -> Any:
        """Start a chunk's exchange.

        Args:
            fits: false where the model has another form than the layout.
            own: `contribution`; None: it is taken now.
        """
        if self.sliced(chunk, exchange.purpose):
            return self._two_phase.start(comm, chunk, own, self._weight(chunk, exchange, fits))
        x = self.contribution(chunk, exchange, fits) if own is None else own
        return comm.start_sum(names.model(chunk.index), x)

    def sliced(self, chunk: Chunk, purpose: Purpose) -> bool:
        """Return whether a chunk travels in slices: not in a mean of all fragments, at the end of a join say."""
        return self._layout.segments[chunk.segment].sliced and purpose.fragment is not None

    def contribution(self, chunk: Chunk, exchange: Exchange, fits: Scalar) -> Any:
        """Return this worker's part in a chunk's mean, for another thread: nothing else changes it.

        Of a chunk in slices, the values that were set aside; None in a join, in which the model does not change.
        """
        beside, vector = exchange.purpose.beside, exchange.purpose.vector
        if self.sliced(chunk, exchange.purpose):
            return self._store.read(vector, chunk) if exchange.purpose.late else None

        def contribution() -> Any:
            if beside:
                return self._store.read(vector, chunk) * 1  # a copy, which the sum may use
            if chunk.role == "parameter":
                return self._mixing.contribution(chunk, exchange.progress.mixing)
            return self._store.read("model", chunk)

        def nothing() -> Any:
            zeros = self._store.zeros(chunk)
            return zeros * 1 if beside else zeros  # whose memory is used again

        # Zeros where the weight is 0: an excluded worker's values may be NaN, and 0 x NaN is NaN.
        return self._ops.weighted(self._weight(chunk, exchange, fits), contribution, nothing)

    def arrived(self, comm: ScopedComm, handle: Any) -> Any:
        """Wait for a chunk's sum and return it; of one in slices, for the phase under way."""
        return self._two_phase.arrived(comm, handle) if isinstance(handle, SlicedChunk) else comm.wait(handle)

    def relayed(self, comm: ScopedComm, handle: Any, exchange: Exchange, table: Any) -> Any:
        """Start the second phase of a chunk in slices, when the first is over; return others as they are.

        Args:
            table: of the ledger, a row per worker.
        """
        if not isinstance(handle, SlicedChunk) or handle.relayed:
            return handle
        weights = columns(table).weight
        total = self._ops.sum(weights)
        # With a total of 0 the verdict will have failed.
        total = self._ops.where(total > 0, total, 1.0)
        outer_step = slice_step(self._runtime, exchange, table)
        return self._two_phase.relay(comm, self.arrived(comm, handle), weights, total, outer_step)

    def over(self, comm: ScopedComm, result: Any, exchange: Exchange, table: Any) -> Any:
        """Wait for both phases of a chunk in slices; return a sum as it is."""
        if not isinstance(result, SlicedChunk):
            return result
        return self._two_phase.arrived(comm, self.relayed(comm, result, exchange, table))

    def finished(self, there: SlicedChunk, exchange: Exchange) -> Iterator[tuple[Chunk, Any]]:
        """Yield the workers' mean of a chunk in slices, or its new anchor if the outer state is divided, in parts.

        Args:
            there: whose phases are over.
        """
        return self._two_phase.finish(there, *_own_part(exchange))

    def computed(self, result: Any, exchange: Exchange) -> Any:
        """Return what `finished` needs of a chunk in slices whose phases are over, computed; a sum as it is."""
        return self._two_phase.computed(result, *_own_part(exchange)) if isinstance(result, SlicedChunk) else result

    def tensors(self, chunk: Chunk, result: Any) -> Sequence[Any]:
        """Return a chunk's result as tensors, for a trace."""
        return self._two_phase.tensors(result) if self._layout.segments[chunk.segment].sliced else [result]

    def nothing(self, chunk: Chunk) -> Sequence[Any]:
        """Return as many empty tensors as a chunk's result is."""
        sliced = self._layout.segments[chunk.segment].sliced
        return self._two_phase.nothing(chunk) if sliced else [self._store.zeros(chunk)[:0]]

    def tensor_count(self, chunk: Chunk) -> int:
        """Return the number of tensors that a chunk's result is."""
        return self._two_phase.tensor_count if self._layout.segments[chunk.segment].sliced else 1

    def from_tensors(self, chunk: Chunk, left: Iterator[Any]) -> Any:
        """Take a chunk's tensors and return its result."""
        if self._layout.segments[chunk.segment].sliced:
            return self._two_phase.from_tensors(chunk, left)
        return self._ops.reshape(next(left), (chunk.size,))  # a branch of a trace has forgotten the length

    def _weight(self, chunk: Chunk, exchange: Exchange, fits: Scalar) -> Scalar:
        weight = exchange.counted if chunk.role == "optimizer_state" else exchange.weights[chunk.fragment]
        if fits is True:
            return weight
        return self._ops.cond(fits, lambda: weight * 1.0, lambda: weight * 0.0)


def _own_part(exchange: Exchange) -> tuple[Scalar, Scalar]:
    """Return this worker's weight in a meeting about a fragment, and whether what it has sent is finite."""
    return exchange.weights[exchange.purpose.fragment or 0], exchange.finite
