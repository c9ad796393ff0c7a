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
from typing import Any, NamedTuple

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.parts import names
from hvd_slowmo.core.parts.codec import Coded, Elementwise, Source, blocks_in, payload_bytes, plain, tiles
from hvd_slowmo.core.parts.layout import BLOCK, ITEMSIZE, Chunk
from hvd_slowmo.core.parts.progress import Observed, Scalar
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.slices import Slices

OuterStep = Callable[[Chunk, Any, Any, Any], tuple[Any, Any]]
"""Takes an outer step: of a part of a chunk, the workers' mean, the anchor and v; returns the new anchor and v."""


class SlicedChunk(NamedTuple):
    """The exchange of a chunk."""

    chunk: Chunk
    values: Any  # of this worker, the whole chunk: as set aside, or as it was read; None: they are read from the model
    parts: Sequence[Any]  # the messages that this worker has sent, by receiver
    handle: Any  # of the phase under way; None: there is none
    received: Sequence[Any] = ()  # the messages of the phase that is over, by sender
    relayed: bool = False  # the second phase has begun
    kept: Sequence[Any] = ()  # then, the new slices of the vectors that are kept in slices
    observed: Any = None  # then, `Observed` of this worker's slice as a vector; None where nothing is measured
    results: Sequence[Any] = ()  # of the whole chunk, once they are computed: see `TwoPhase.computed`

    @property
    def all_tensors(self) -> list[Any]:
        """Those of an exchange that is over."""
        observed = [] if self.observed is None else [self.observed]
        return [*self.parts, *self.received, *self.kept, *observed, *self.results]

    def with_tensors(self, tensors: Iterator[Any]) -> SlicedChunk:
        """Return the same with other tensors, in the order of `all_tensors`."""
        parts, received, kept = ([next(tensors) for _ in each] for each in (self.parts, self.received, self.kept))
        observed = None if self.observed is None else next(tensors)
        results = [next(tensors) for _ in self.results]
        return self._replace(parts=parts, received=received, kept=kept, observed=observed, results=results)


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
        self._writes_at_once = runtime.writes_at_once
        # In a trace a late exchange returns results: as many tensors of known lengths for each fragment. Elsewhere it
        # keeps the messages where one fragment is the whole model: its results would be two vectors as long.
        self._computes = not self._ops.keeps_handles or (self._few_bits and runtime.layout.fragments > 1)
        self._observes = runtime.observe and runtime.config.shards
        self._rank, self._size = runtime.comm.rank, runtime.comm.size
        self._parts: dict[tuple[int, int, int], Chunk] = {}

    def start(self, comm: ScopedComm, chunk: Chunk, own: Any, weight: Scalar) -> SlicedChunk:
        """Start the first phase.

        Args:
            own: values of the whole chunk; None: the model's.
            weight: this worker's; where it is 0 it sends zeros.
        """
        slices, bits = self._slices(chunk), self._bits(chunk)
        values = own
        if own is None and self._codec.tile is None:  # all of it is read at once, and once for both phases
            values = self._store.read("model", chunk)
            # `finish` needs them before the second next read. Where all chunks are written at once they would be many.
            own = values if self._few_bits and not self._writes_at_once else None
        sent = self._contribution(chunk, values, weight)
        # With fewer blocks than workers most slices are empty: encoding each would take longer than the others.
        nothing = self._codec.encode(plain(self._empty(chunk)), 0, 0, bits) if slices.blocks < self._size else None
        spans = [slices.span(rank) for rank in range(self._size)]
        parts = [nothing if first == last else self._codec.encode(sent, first, last, bits) for first, last in spans]
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
        chunk, codec, bits = sliced.chunk, self._codec, self._bits(sliced.chunk)
        self.unanswered.pop(chunk.index, None)
        blocks = self._own.lengths[chunk.index] // BLOCK
        sources = [partial(codec.cut, message, bits) for message in sliced.received]
        sent = Elementwise(self._mean, sources, (bits, weights, total)) if blocks else plain(self._empty(chunk))
        kept: list[Any] = []
        observed = None
        if self._config.shards:
            mean = codec.compute(sent, 0, blocks)
            stepped, kept, observed = self._stepped(sliced, weights, mean, outer_step)
            sent = plain(stepped)
        if self._few_bits:
            residual = blocks_in(self._store.read_slice("slice_residual", chunk.index))
            sent = Elementwise(_with_residual, (*sent.sources, residual), (sent.function, *sent.scalars))
            message, rest = codec.encode_with_rest(sent, 0, blocks, bits)
            kept.append(rest)
        else:
            message = codec.encode(sent, 0, blocks, bits)
        lengths = [payload_bytes(self._slices(chunk).elements(rank), bits) for rank in range(self._size)]
        handle = comm.start_allgather(names.mean(chunk.index), message, lengths)
        if self._ops.keeps_handles:
            self.unanswered[chunk.index] = kept
        return sliced._replace(handle=handle, received=(), relayed=True, kept=kept, observed=observed)

    def _mean(self, bits: int, weights: Any, total: Scalar, *codes: Coded) -> Any:
        """Return a piece of the mean from what the workers have sent, in the order of ranks."""
        mean = None
        for rank, coded in enumerate(codes):
            values = self._codec.decode(coded, bits)
            part = values * self._ops.cast_like(weights[rank], values)
            mean = part if mean is None else mean + part
        return mean / self._ops.cast_like(total, mean)

    def _stepped(
        self, sliced: SlicedChunk, weights: Any, mean_sent: Any, outer_step: OuterStep
    ) -> tuple[Any, list[Any], Any]:
        """Take the outer step of this worker's slice.

        Args:
            weights: of all workers, by rank.
            mean_sent: the mean of what they have sent.

        Returns:
            What it sends; the new anchor and v; `SlicedChunk.observed`.
        """
        chunk, store, padded = sliced.chunk, self._store, self._codec.padded
        part = self._own.part(chunk)
        if part is None:
            nothing = self._ops.vector([0.0] * len(Observed._fields)) if self._observes else None
            empty = self._empty(chunk)
            return empty, [empty] * len({"anchor", "v"} & set(self._config.sliced_vectors)), nothing
        mean = mean_sent[: part.size]
        length = self._own.lengths[chunk.index]
        if self._few_bits:
            before = store.read("anchor", part)
            mean = before - mean
        else:
            before = store.read_slice("anchor", chunk.index)[: part.size]
        # Copies: nothing is written before the verdict.
        v = store.read_slice("v", chunk.index)[: part.size] * 1 if self._config.beta else None
        observed = self._observed(sliced, weights, mean_sent, mean, before - mean, v) if self._observes else None
        anchor, v = outer_step(part, mean, before * 1, v)
        sent = padded(anchor - before if self._few_bits else anchor, length)
        kept = [] if self._few_bits else [sent]
        kept += [] if v is None else [padded(v, length)]
        return sent, kept, observed

    def _observed(self, sliced: SlicedChunk, weights: Any, mean_sent: Any, mean: Any, delta: Any, v: Any) -> Any:
        """Return the measurements of this worker's slice as a vector; the drift is that of all workers.

        Args:
            weights: of all workers, by rank.
            mean_sent: the mean of what they have sent; in few bits that is no parameters.
            mean: of the parameters.
        """
        dot, bits = self._ops.dot, self._bits(sliced.chunk)
        blocks = self._own.lengths[sliced.chunk.index] // BLOCK
        drift, counted = 0.0, self._ops.sum(self._ops.where(weights > 0, 1.0, 0.0))
        for start, stop in tiles(self._codec, 0, blocks):
            for rank, message in enumerate(sliced.received):
                sent = self._codec.decode(self._codec.cut(message, bits, start, stop), bits)
                away = sent - mean_sent[start * BLOCK : stop * BLOCK]
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

        What is computed now comes in parts, each of which is used up before the next, while a core's cache holds it.

        Args:
            sliced: whose second phase is over.
            weight, finite: of this worker: what it owes stays where it weighs nothing, and is forgotten where its
                values were not finite.
        """
        chunk, store = sliced.chunk, self._store
        self.unanswered.pop(chunk.index, None)
        for name, value in zip(self._config.sliced_vectors, sliced.kept, strict=True):
            store.write_slice(name, chunk.index, value)

        known = [(chunk, sliced.results)] if sliced.results else self._results(sliced, weight, finite)
        for part, (value, *owed) in known:
            if self._few_bits:
                store.write("residual", part, *owed)
            if self._few_bits and self._config.shards:
                store.write("anchor", part, value)
            yield part, value

    def _results(self, sliced: SlicedChunk, weight: Scalar, finite: Scalar) -> Iterator[tuple[Chunk, Sequence[Any]]]:
        """Yield parts of a chunk, each with the workers' mean or the new anchor, and in few bits the new residual."""
        chunk, store = sliced.chunk, self._store
        bits = self._bits(chunk)
        for part, blocks, source_of in self._pieces(chunk):
            value = self._codec.decode(source_of(sliced.received)(*blocks), bits)[: part.size]
            if not self._few_bits:
                yield part, [value]
                continue
            sources = (*self._sources(chunk, sliced.values), source_of(sliced.parts))
            owed = Elementwise(self._still_owed, sources, (bits, weight, finite))
            anchor = store.read("anchor", part)
            value = anchor + value if self._config.shards else anchor - value
            yield part, [value, self._codec.compute(owed, *blocks)]

    def _pieces(self, chunk: Chunk) -> Iterator[tuple[Chunk, tuple[int, int], Callable[[Sequence[Any]], Source]]]:
        """Yield the parts of a chunk in which it is worked on, their blocks, and the source of these in messages."""
        bits, slices = self._bits(chunk), self._slices(chunk)
        if self._codec.tile is None:  # the fewest operations of a trace
            yield chunk, (0, slices.blocks), lambda messages: lambda *_: self._codec.cut_all(messages, bits)
            return
        for rank in range(self._size):
            begin, end = slices.span(rank)
            for start, stop in tiles(self._codec, begin, end):
                yield self._part(chunk, start, stop), (start, stop), partial(self._source, rank, begin, bits)

    def _source(self, rank: int, begin: int, bits: int, messages: Sequence[Any]) -> Source:
        """Return the source of the blocks in the message of a rank, whose first block is `begin`."""
        return lambda first, last: self._codec.cut(messages[rank], bits, first - begin, last - begin)

    def _still_owed(
        self, bits: int, weight: Scalar, finite: Scalar, x: Any, anchor: Any, residual: Any, sent: Coded
    ) -> Any:
        """Return a piece of the residual: what has been sent is owed no more."""
        owed = _owed(x, anchor, residual)
        owed = owed - self._codec.decode(sent, bits)[: owed.shape[0]]
        owed = self._ops.choose(weight == 0, lambda: residual, owed)
        return self._ops.choose(finite == 0, partial(self._zeros, residual), owed)

    def computed(self, sliced: SlicedChunk, weight: Scalar, finite: Scalar) -> SlicedChunk:
        """Return a late exchange with its results in the place of the messages, computed beside the training.

        Where that takes too much memory it keeps the messages, for `finish`. Nothing is written.

        Args:
            sliced: whose second phase is over.
            weight, finite: as in `finish`.
        """
        if not self._computes:
            return sliced
        parts = [values for _, values in self._results(sliced, weight, finite)]
        results = [self._ops.joined(each) for each in zip(*parts, strict=True)]
        return sliced._replace(values=None, parts=(), received=(), results=results)

    def tensors(self, sliced: SlicedChunk) -> list[Any]:
        """Return the tensors of an exchange whose results are computed, for `from_tensors`."""
        assert sliced.results, "in a trace they are"
        return sliced.all_tensors

    def nothing(self, chunk: Chunk) -> list[Any]:
        """Return as many tensors, which are empty."""
        empty = self._empty(chunk)
        observed = [self._ops.vector([0.0] * len(Observed._fields))] if self._observes else []
        return [*[empty] * len(self._config.sliced_vectors), *observed, *[empty] * (1 + self._few_bits)]

    @property
    def tensor_count(self) -> int:
        """Number of the tensors of `tensors`."""
        return 1 + self._few_bits + len(self._config.sliced_vectors) + self._observes

    def from_tensors(self, chunk: Chunk, tensors: Iterator[Any]) -> SlicedChunk:
        """Take a late exchange's tensors and return it."""

        def taken(length: int, count: int) -> list[Any]:
            return [self._ops.reshape(next(tensors), (length,)) for _ in range(count)]  # which a branch has forgotten

        kept = taken(self._own.lengths[chunk.index], len(self._config.sliced_vectors))
        observed = taken(len(Observed._fields), 1)[0] if self._observes else None
        results = taken(chunk.size, 1 + self._few_bits)
        return SlicedChunk(chunk, None, (), None, (), True, kept, observed, results)

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

    def _contribution(self, chunk: Chunk, own: Any, weight: Scalar) -> Elementwise:
        """Return the vector that this worker sends: g in few bits, else its values; zeros where it weighs nothing."""
        return Elementwise(self._sent_values, self._sources(chunk, own), (weight,))

    def _sent_values(self, weight: Scalar, *of: Any) -> Any:
        """Return a piece of what is sent."""
        g = _owed(*of)
        return self._ops.choose(weight == 0, partial(self._zeros, g), g)

    def _sources(self, chunk: Chunk, own: Any) -> tuple[Source, ...]:
        """Return the vectors of which the contribution consists: this worker's values, in few bits anchor and residual.

        Args:
            own: the values; None: the model's.
        """

        def read(vector: str, first: int, last: int) -> Any:
            return self._store.read(vector, self._part(chunk, first, last))

        values = partial(read, "model") if own is None else blocks_in(own)
        return (values, partial(read, "anchor"), partial(read, "residual")) if self._few_bits else (values,)

    def _zeros(self, like: Any) -> Any:
        return self._codec.padded(like[:0], like.shape[0])

    def _empty(self, chunk: Chunk) -> Any:
        # Not of the store's zeros, which lie in memory that another thread may use.
        part = self._own.part(chunk) or chunk
        if self._few_bits:
            return self._store.read("anchor", part)[:0] * 1
        return self._store.read_slice("anchor", chunk.index)[:0] * 1


def _owed(x: Any, anchor: Any = None, residual: Any = None) -> Any:
    """Return a piece of g in few bits, and the values where there is nothing else."""
    return x if anchor is None else (anchor - x) + residual


def _with_residual(function: Callable[..., Any], *given: Any) -> Any:
    """Return a piece of a vector and the residual of sending it, which is the last one given."""
    *others, residual = given
    return function(*others) + residual
