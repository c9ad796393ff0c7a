"""A meeting of all workers: the ledger, its verdict, and the mean of their parameters.

The ledger and the first chunk travel together. Nothing else starts and nothing is written before the verdict, so a
failed one raises on every worker with nothing left in flight. A meeting that is late exchanges all of its chunks beside
the training, from a copy of the model; what a failed verdict finds in flight is awaited and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.average.chunk_means import ChunkMeans
from hvd_slowmo.core.average.exchange import Exchange, Purpose
from hvd_slowmo.core.average.ledger import (
    AVERAGE,
    RATES,
    TRAINING,
    Row,
    Verdict,
    all_average,
    clocks,
    columns,
    entry_warning,
    error_text,
    exclusion_warning,
    own_row,
    rates_warning,
    row_length,
    verdict,
)
from hvd_slowmo.core.average.mixing import Mixing
from hvd_slowmo.core.average.two_phase import SlicedChunk
from hvd_slowmo.core.parts import names
from hvd_slowmo.core.parts.layout import Chunk
from hvd_slowmo.core.parts.progress import Progress, Scalar, Vector
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.store import Condition
from hvd_slowmo.wire.tensors import Role


class Meeting(NamedTuple):
    """A worker's knowledge once the verdict is known, before anything is written."""

    exchange: Exchange
    table: Any  # a row per worker, see `hvd_slowmo.core.average.ledger`
    verdict: Verdict
    moved: Any  # per parameter, the number of workers that may have moved it
    totals: tuple[Scalar, ...]  # sums of the workers' weights, per fragment
    first: tuple[Any, ...]  # the sums of the first chunks


class Meetings:
    """The meetings of one worker.

    Args:
        runtime: of this worker.
        mixing: of this worker.

    Attributes:
        tracks: note what has been written, so that an outer step that is broken off can be completed.
        written: numbers of the chunks that have been written of an outer step that is under way; None where none is.
            Where it is broken off, by a worker that is lost, the survivors hand these to each other.
        unanswered: see `hvd_slowmo.core.average.two_phase.TwoPhase`.
    """

    def __init__(self, runtime: Runtime, mixing: Mixing) -> None:
        self._runtime = runtime
        self._ops, self._comm, self._store = runtime.ops, runtime.comm, runtime.store
        self._mixing = mixing
        self._discarded: list[Exchange] = []
        self.tracks = False
        self.written: set[int] | None = None
        self._means = ChunkMeans(runtime, mixing)
        self.unanswered = self._means.unanswered
        layout = runtime.layout
        self._chunks = {None: layout.in_turn} | {f: tuple(layout.of_fragment(f)) for f in range(layout.fragments)}
        # By segment, the most chunks that a fragment has: each branch of a trace returns as many, whatever it is about.
        self._slots = {
            segment: max(len(self._of_fragment(f, segment)) for f in range(layout.fragments))
            for segment in dict.fromkeys(chunk.segment for chunk in layout.chunks)
        }

    def meet(self, progress: Progress, step: Scalar, purpose: Purpose) -> Meeting:
        """Exchange the ledger, and the first chunk beside it.

        Args:
            step: at which the workers meet; it must be the same on all.

        Raises:
            ValueError: on every worker, where the verdict has failed; nothing is written and nothing is in flight.
        """
        condition = self._store.condition(purpose.fragment)
        if self.written is not None and purpose.fragment is not None and condition.misfit == 0:
            # It is taken again, and the first attempt has begun the next block's notes.
            condition = self._store.sent_condition(purpose.fragment)
        meeting = self.finish(self.begin(progress, step, purpose, condition))
        self._store.hold(meeting.moved)
        return meeting

    def begin(
        self,
        progress: Progress,
        step: Scalar,
        purpose: Purpose,
        condition: Condition,
        arrived: tuple[Any, ...] = (),
    ) -> Exchange:
        """Start the ledger, and the first chunk with it, or all chunks of a late meeting.

        Args:
            arrived: result of `exchanged`; nothing is started then.
        """
        self.drop_discarded()
        ops, comm, config, layout = self._ops, self._comm, self._runtime.config, self._runtime.layout
        fits = condition.misfit == 0
        # A model of another form is not looked at: the verdict will refuse it.
        finite = ops.cond(
            fits,
            lambda: ops.where(self._store.finite(purpose.vector, purpose.fragment), 1.0, 0.0),
            lambda: ops.where(True, 1.0, 0.0),
        )
        counted = finite if config.nonfinite == "exclude" else 1.0
        plain = purpose.reason == AVERAGE or self._mixing.equal_weights

        if plain:
            weights = ops.vector([counted] * layout.fragments)
        else:
            weights = progress.since / (config.tau or 1) * purpose.counts * counted
        if arrived:
            return Exchange(purpose, None, (), weights, counted, finite, condition, progress, arrived)
        at = purpose.fragment or 0
        row = Row(
            meeting_step=step,
            reason=purpose.reason,
            training=purpose.training,
            leaving=purpose.leaving,
            finite=finite,
            weight=weights[at],
            counted=counted,
            steps=progress.step,
            rate_steps=progress.rate_steps[at],
            misfit=condition.misfit,
            entered=condition.entered,
            drift=progress.observed[0],
            ending=self._runtime.roll.ending(),
            regroups=self._runtime.regrouping.heard.get(),
        )
        parts = own_row(ops, comm.rank, comm.size, row, progress.rate_sums[at], clocks(ops, progress))
        ledger = ops.pack([*parts, condition.moved])
        exchange = Exchange(purpose, None, (), weights, counted, finite, condition, progress)
        chunks = self._left(purpose.fragment)
        if purpose.beside:
            return exchange._replace(ledger=self._start_beside(exchange, ledger, fits))
        exchange = exchange._replace(ledger=comm.start_sum(names.ledger(), ledger))
        first = () if purpose.ledger_alone else chunks[:1]
        return exchange._replace(started=tuple(self._means.start(comm, chunk, exchange, fits) for chunk in first))

    def _start_beside(self, exchange: Exchange, ledger: Any, fits: Scalar) -> Any:
        """Start the ledger and all chunks of a meeting beside the caller; the result has all of them.

        Of an average of all, the ledger alone. Where others have come for a fragment, its chunks follow all the same:
        they have started theirs, and the verdict will refuse both.
        """
        means, average = self._means, exchange.purpose.fragment is None
        if average:
            exchange = exchange._replace(purpose=replace(exchange.purpose, fragment=exchange.purpose.following))
        fragment = exchange.purpose.fragment
        chunks = self._chunks[fragment]

        def contributions() -> list[Any]:
            return [means.contribution(chunk, exchange, fits) for chunk in chunks]

        # Another thread must not read what changes: the model, memory that is used again, and what a load replaces.
        # For an average this one waits.
        own = [] if average else contributions()

        def start(comm: ScopedComm, own: list[Any]) -> list[Any]:
            return [means.start(comm, chunk, exchange, fits, x) for chunk, x in zip(chunks, own, strict=True)]

        def travel(comm: ScopedComm) -> tuple[Any, ...]:
            begun = comm.start_sum(names.ledger(fragment or 0), ledger)
            started = [] if average else start(comm, own)
            arrived = comm.wait(begun)
            if average:
                if all_average(self._ops, self._tables(arrived)[0]):
                    return (arrived,)
                started = start(comm, contributions())
            # Before the verdict, which comes when all is there; and whatever it will be, the same on all workers.
            table = self._tables(arrived)[0]
            started = [means.relayed(comm, x, exchange, table) for x in started]
            # One after the other: later ones travel meanwhile, and the messages of this one are freed.
            return (arrived, *(means.computed(means.arrived(comm, started.pop(0)), exchange) for _ in chunks))

        return self._comm.start_beside(self._ops.detached(travel))

    def _tables(self, ledger: Any) -> tuple[Any, Any]:
        """Return a row per worker, and per parameter the number of workers that may have moved it."""
        ops, size, width = self._ops, self._comm.size, row_length(self._runtime.layout)
        everything = ops.unpack(ledger)
        return ops.reshape(everything[: size * width], (size, width)), everything[size * width :]

    def finish(self, exchange: Exchange, undo: Callable[[], None] | None = None) -> Meeting:
        """Wait for the ledger, and judge it.

        Args:
            undo: is called before the error, where the verdict has failed.

        Raises:
            ValueError: on every worker, where the verdict has failed; nothing is written and nothing of this meeting is
                in flight.
        """
        ops, comm, config = self._ops, self._comm, self._runtime.config
        purpose, condition, layout = exchange.purpose, exchange.condition, self._runtime.layout
        ledger, *first = exchange.arrived or self.exchanged(exchange)
        rows, moved = self._tables(ledger)
        judged = RATES + layout.group_count
        table = rows[:, :judged]
        found = verdict(ops, table, config.nonfinite)
        totals = self._totals(exchange, rows[:, judged:], table, found)
        meeting = Meeting(exchange, rows, found, moved, totals, tuple(first))
        mixes = config.gossip is not None
        words = error_text(comm.ranks, comm.name, layout.names, condition.name, mixes)
        meeting = ops.error_if(found.failed, table, words, meeting, undo)
        if self._runtime.watches:
            ops.warn("entered", found.entered, table, entry_warning(comm.ranks, comm.name, config))
        self._runtime.regrouping.agreed.set(found.regroups)
        if purpose.reason == TRAINING:
            ops.warn("rates", found.rates_differ, table, rates_warning(comm.ranks, comm.name))
        if config.nonfinite == "exclude":
            words = exclusion_warning(comm.ranks, comm.name)
            ops.warn("excluded", found.counted < comm.size, table, words, always=True)
        return meeting

    def exchanged(self, exchange: Exchange) -> tuple[Any, ...]:
        """Wait for what has been started: nothing is in flight before the verdict is known."""
        if exchange.purpose.beside:
            arrived: tuple[Any, ...] = self._ops.attached(self._comm.wait(exchange.ledger))
            return arrived
        return (self._comm.wait(exchange.ledger), *(self._means.arrived(self._comm, x) for x in exchange.started))

    def discard(self, exchanges: Iterable[Exchange]) -> None:
        """Never finish these: they are dropped when the next one begins, since their names are taken until then."""
        self._discarded += exchanges

    @property
    def discarded(self) -> bool:
        """True while exchanges are in flight that nobody will finish."""
        return bool(self._discarded)

    def drop_discarded(self) -> None:
        """Wait for the exchanges that nobody needs any more."""
        while self._discarded:
            self.exchanged(self._discarded.pop(0))

    def abandon(self) -> None:
        """Wait for the exchanges that were given up, failed or not."""
        while self._discarded:
            with suppress(Exception):  # a worker was lost
                self.exchanged(self._discarded.pop(0))

    def sums(
        self, meeting: Meeting, roles: Sequence[Role], observe: Callable[[Vector], None] = lambda _: None
    ) -> Iterator[tuple[Chunk, Any, Scalar]]:
        """Yield each chunk, the workers' sum of it, and the divisor of the mean; the next chunk travels meanwhile.

        Chunks that travel in slices come in parts; if the outer state is divided, with the new anchor for the sum.

        Args:
            observe: takes the measurements of a chunk whose outer state is divided.
        """
        chunks = [chunk for chunk in self._left(meeting.exchange.purpose.fragment) if chunk.role in roles]
        results = self._results(meeting, chunks)
        if self._runtime.writes_at_once:
            results = self._together(meeting, results)
        for chunk, result in results:
            if isinstance(result, SlicedChunk):
                there = self._means.over(self._comm, result, meeting.exchange, meeting.table)
                if there.observed is not None:
                    observe(there.observed)
                parts = self._means.finished(there, meeting.exchange)
                yield from ((part, mean, 1.0) for part, mean in parts)
            else:
                yield chunk, result, self.divisor(chunk, meeting)
            if self.written is not None:
                self.written.add(chunk.index)
        self.written = None

    def _results(self, meeting: Meeting, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Any]]:
        """Yield each chunk and its sum, or its exchange in slices; the next chunk travels meanwhile."""
        arrived = list(meeting.first)[: len(chunks)]
        following = None if len(arrived) == len(chunks) or arrived else self._start_later(chunks[0], meeting)
        for number, chunk in enumerate(chunks):
            result = arrived[number] if number < len(arrived) else self._means.arrived(self._comm, following)
            if len(arrived) <= number + 1 < len(chunks):
                following = self._start_later(chunks[number + 1], meeting)
            yield chunk, result

    def _together(self, meeting: Meeting, results: Iterator[tuple[Chunk, Any]]) -> Iterator[tuple[Chunk, Any]]:
        """Return the results with all their phases over, none of which can be used before all of them are there."""
        exchange, table = meeting.exchange, meeting.table
        over = [(chunk, self._means.over(self._comm, result, exchange, table)) for chunk, result in results]
        tensors = [
            x for _, result in over for x in (result.all_tensors if isinstance(result, SlicedChunk) else [result])
        ]
        there = iter(self._ops.together(tensors))
        return iter([(c, x.with_tensors(there) if isinstance(x, SlicedChunk) else next(there)) for c, x in over])

    def _left(self, fragment: int | None) -> Sequence[Chunk]:
        """Return the chunks of a meeting that have not been written."""
        chunks = self._chunks[fragment]
        return [chunk for chunk in chunks if chunk.index not in self.written] if self.written else chunks

    def flattened(self, exchange: Exchange | None) -> list[Any]:
        """Wait for an exchange; return its results as tensors, for a trace: as many for each fragment; see `restored`.

        Args:
            exchange: of a late meeting; None: there is none.
        """
        layout = self._runtime.layout
        tensors: dict[int, list[Any]] = {segment: [] for segment in self._slots}
        if exchange is None:
            length = self._comm.size * row_length(layout) + len(layout.groups)
            fragment, ledger = None, self._ops.pack([self._ops.vector([0.0] * length)])
        else:
            fragment = exchange.purpose.fragment
            ledger, *results = self.exchanged(exchange)
            for chunk, result in zip(self._of_fragment(fragment), results, strict=True):
                tensors[chunk.segment] += self._means.tensors(chunk, result)
        for segment, most in self._slots.items():
            missing = most - len(self._of_fragment(fragment, segment))
            if missing:
                tensors[segment] += [*self._means.nothing(self._first_of(segment))] * missing
        return [ledger, *(x for each in tensors.values() for x in each)]

    def restored(self, flat: Sequence[Any], fragment: int) -> tuple[Any, ...]:
        """Return the results of a late meeting about a fragment with these tensors."""
        left = iter(flat[1:])
        found: dict[int, Any] = {}
        for segment, most in self._slots.items():
            mine = self._of_fragment(fragment, segment)
            found |= {chunk.index: self._means.from_tensors(chunk, left) for chunk in mine}
            for _ in range((most - len(mine)) * self._means.tensor_count(self._first_of(segment))):
                next(left)
        assert next(left, None) is None, "as many as `flattened` has returned"
        return (flat[0], *(found[chunk.index] for chunk in self._of_fragment(fragment)))

    def _of_fragment(self, fragment: int | None, segment: int | None = None) -> list[Chunk]:
        """Return the chunks of a fragment, or those in a segment; of no fragment there are none."""
        chunks = () if fragment is None else self._chunks[fragment]
        return [chunk for chunk in chunks if segment in (None, chunk.segment)]

    def _first_of(self, segment: int) -> Chunk:
        return next(chunk for chunk in self._runtime.layout.chunks if chunk.segment == segment)

    def divisor(self, chunk: Chunk, meeting: Meeting) -> Scalar:
        """Return the sum of the workers' weights in a chunk's mean."""
        return meeting.verdict.counted if chunk.role == "optimizer_state" else meeting.totals[chunk.fragment]

    def write_mean(self, meeting: Meeting) -> None:
        """Set the parameters and statistics to the workers' mean; nothing else changes."""
        several = self._runtime.layout.fragments > 1
        for chunk, total, divisor in self.sums(meeting, ("parameter", "statistic")):
            # Where nobody has trained a fragment since its last average, all hold the same and the sum is 0.
            safe = self._ops.where(divisor > 0, divisor, 1.0) if several else divisor
            mean = self._runtime.kernels.divide(total, self._ops.cast_like(safe, total))
            if several:
                mean = self._ops.choose(divisor == 0, partial(self._store.read, "model", chunk), mean)
            self._store.write("model", chunk, mean)

    def _totals(self, exchange: Exchange, clocks: Any, table: Any, found: Verdict) -> tuple[Scalar, ...]:
        """Return the sums of the workers' weights, per fragment; in a meeting about one fragment, for that one."""
        fragments, purpose = self._runtime.layout.fragments, exchange.purpose
        plain = purpose.reason == AVERAGE or self._mixing.equal_weights
        if fragments == 1 or purpose.fragment is not None or plain:
            return (found.weight,) * fragments
        counted = columns(table).counted
        tau = self._runtime.config.tau or 1
        return tuple(self._ops.sum(counted * clocks[:, fragment]) / tau for fragment in range(fragments))

    def _start_later(self, chunk: Chunk, meeting: Meeting) -> Any:
        """Start a chunk whose turn comes only once the verdict is known."""
        start = partial(self._means.start, self._comm, chunk, meeting.exchange, True)
        return self._ops.after(meeting.verdict.weight, start)
