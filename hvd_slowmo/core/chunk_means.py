"""The mean of a chunk over the workers, in the way that the settings choose: a sum, or two exchanges in few bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core import names
from hvd_slowmo.core.exchange import Exchange, Purpose
from hvd_slowmo.core.layout import Chunk
from hvd_slowmo.core.mixing import Mixing
from hvd_slowmo.core.progress import Scalar, Vector
from hvd_slowmo.core.runtime import Runtime
from hvd_slowmo.core.two_phase import CodedChunk, TwoPhase


class ChunkMeans:
    """The exchanges of one worker's chunks.

    Args:
        runtime: of this worker.
        mixing: of this worker.
    """

    def __init__(self, runtime: Runtime, mixing: Mixing) -> None:
        self._layout, self._ops, self._store = runtime.layout, runtime.ops, runtime.store
        self._mixing = mixing
        self._two_phase = TwoPhase(runtime) if runtime.config.bits < 32 else None

    def start(self, comm: ScopedComm, chunk: Chunk, exchange: Exchange, fits: Scalar) -> Any:
        """Start a chunk's exchange.

        Args:
            fits: false where the model has another form than the layout.
        """
        if self.coded(chunk, exchange.purpose):
            weight = self._weight(chunk, exchange, fits)
            return self._few_bits.start(comm, chunk, exchange.purpose.vector, weight)
        return comm.start_sum(names.model(chunk.index), self.contribution(chunk, exchange, fits))

    def coded(self, chunk: Chunk, purpose: Purpose) -> bool:
        """Return whether a chunk travels in few bits: not in a mean of all fragments, at the end of a join say."""
        return self._layout.segments[chunk.segment].coded and purpose.fragment is not None

    def contribution(self, chunk: Chunk, exchange: Exchange, fits: Scalar) -> Any:
        """Return this worker's part in a chunk's sum."""
        beside, vector = exchange.purpose.beside, exchange.purpose.vector

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
        """Wait for a chunk's sum and return it; in few bits, wait for the phase under way."""
        return self._few_bits.arrived(comm, handle) if isinstance(handle, CodedChunk) else comm.wait(handle)

    def relayed(self, comm: ScopedComm, handle: Any, weights: Vector) -> Any:
        """Start the second phase of a chunk in few bits, when the first is over; return others as they are.

        Args:
            weights: of all workers, by rank.
        """
        if not isinstance(handle, CodedChunk):
            return handle
        total = self._ops.sum(weights)
        # With a total of 0 the verdict will have failed.
        total = self._ops.where(total > 0, total, 1.0)
        return self._few_bits.relay(comm, self.arrived(comm, handle), weights, total)

    def decoded(
        self, comm: ScopedComm, coded: CodedChunk, exchange: Exchange, weights: Vector
    ) -> Iterator[tuple[Chunk, Any]]:
        """Yield the workers' mean of a chunk that travels in few bits, in parts.

        Args:
            coded: whose first phase is over, or both.
            weights: of all workers, by rank.
        """
        if coded.rest is None:
            coded = self.arrived(comm, self.relayed(comm, coded, weights))
        return self._few_bits.finish(coded, exchange.weights[exchange.purpose.fragment or 0], exchange.finite)

    def tensors(self, chunk: Chunk, result: Any) -> Sequence[Any]:
        """Return a chunk's result as tensors, for a trace; as many empty ones for None."""
        coded = self._layout.segments[chunk.segment].coded
        if result is None:
            return self._few_bits.nothing(chunk) if coded else [self._store.zeros(chunk)[:0]]
        return self._few_bits.tensors(result) if coded else [result]

    def from_tensors(self, chunk: Chunk, left: Iterator[Any]) -> Any:
        """Take a chunk's tensors and return its result."""
        if self._layout.segments[chunk.segment].coded:
            return self._few_bits.from_tensors(chunk, "in_flight", next(left), next(left), next(left))
        return next(left)

    @property
    def _few_bits(self) -> TwoPhase:
        return cast(TwoPhase, self._two_phase)

    def _weight(self, chunk: Chunk, exchange: Exchange, fits: Scalar) -> Scalar:
        weight = exchange.counted if chunk.role == "optimizer_state" else exchange.weights[chunk.fragment]
        if fits is True:
            return weight
        return self._ops.cond(fits, lambda: weight * 1.0, lambda: weight * 0.0)
