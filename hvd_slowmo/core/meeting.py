"""A meeting of all workers: the ledger, its verdict, and the mean of their parameters.

The ledger and the first chunk travel together. Nothing else starts and nothing is written before the verdict, so a
failed one raises on every worker with nothing left in flight. A meeting that is late starts all of its chunks at once,
from a copy of the model; what a failed verdict finds in flight is awaited and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from hvd_slowmo.core import names
from hvd_slowmo.core.layout import Chunk
from hvd_slowmo.core.ledger import (
    AVERAGE,
    RATES,
    TRAINING,
    Row,
    Verdict,
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
from hvd_slowmo.core.mixing import Mixing
from hvd_slowmo.core.progress import Progress, Scalar
from hvd_slowmo.core.runtime import Runtime
from hvd_slowmo.core.store import Condition
from hvd_slowmo.core.two_phase import CodedChunk, TwoPhase
from hvd_slowmo.wire.tensors import Role


@dataclass(frozen=True)
class Purpose:
    """The reason for which a worker comes to a meeting.

    Attributes:
        training: 1, or 0 in a join.
        counts: 0 if this worker has only followed the others' steps, so that its parameters weigh nothing.
        leaving: 1: it joins for the last time.
        reason: TRAINING or AVERAGE of the ledger.
        ledger_alone: the first chunk does not travel with the ledger: whether an average follows is not known yet.
        fragment: of the parameters that the meeting is about; None for all.
        late: the model is taken as it was set aside ("in_flight"), and its chunks start at once.
        beside_late: the others' meeting is late, so that all chunks start at once here too.
    """

    training: int = 1
    counts: int = 1
    leaving: Scalar = 0
    reason: int = TRAINING
    ledger_alone: bool = False
    fragment: int | None = 0
    late: bool = False
    beside_late: bool = False

    @property
    def at_once(self) -> bool:
        """True if all chunks start together, from copies: an adapter has memory to put two of them together."""
        return self.late or self.beside_late


PLAIN_AVERAGE = Purpose(reason=AVERAGE, fragment=None)
"""A meeting in which every worker weighs the same."""


class Exchange(NamedTuple):
    """A meeting that has begun."""

    purpose: Purpose
    ledger: Any  # its handle
    started: tuple[Any, ...]  # handles of the first chunks, in their order
    weights: tuple[Scalar, ...]  # this worker's, per fragment
    counted: Scalar  # its weight in plain means
    finite: Scalar  # 1: this worker's parameters are
    condition: Condition
    progress: Progress  # this worker's state
    arrived: tuple[Any, ...] = ()  # results in the place of handles: of the ledger and of the first chunks


class Meeting(NamedTuple):
    """A worker's knowledge once the verdict is known, before anything is written."""

    exchange: Exchange
    table: Any  # a row per worker, see `hvd_slowmo.core.ledger`
    verdict: Verdict
    moved: Any  # per parameter, the number of workers that may have moved it
    totals: tuple[Scalar, ...]  # sums of the workers' weights, per fragment
    first: tuple[Any, ...]  # the sums of the first chunks


class Meetings:
    """The meetings of one worker.

    Args:
        runtime: of this worker.
        mixing: of this worker.
    """

    def __init__(self, runtime: Runtime, mixing: Mixing) -> None:
        self._runtime = runtime
        self._ops, self._comm, self._store = runtime.ops, runtime.comm, runtime.store
        self._mixing = mixing
        # So many meetings can be in flight at a time where a collective outlives a call.
        self._slots = max(1, runtime.config.delay) if runtime.ops.keeps_handles else 1
        self._count = 0
        self._discarded: list[Exchange] = []
        self._relays: list[CodedChunk] = []
        self._two_phase = TwoPhase(runtime) if runtime.config.bits < 32 else None
        layout = runtime.layout
        self._chunks = {None: layout.in_turn} | {f: tuple(layout.of_fragment(f)) for f in range(layout.fragments)}

    def meet(self, progress: Progress, step: Scalar, purpose: Purpose) -> Meeting:
        """Exchange the ledger, and the first chunk beside it.

        Args:
            step: at which the workers meet; it must be the same on all.

        Raises:
            ValueError: on every worker, where the verdict has failed; nothing is written and nothing is in flight.
        """
        meeting = self.finish(self.begin(progress, step, purpose, self._store.condition(purpose.fragment)))
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
        """Start the ledger, and the first chunk beside it, or all chunks of a late meeting.

        Args:
            arrived: result of `exchanged`; nothing is started then.
        """
        self.drop_discarded()
        ops, comm, config, layout = self._ops, self._comm, self._runtime.config, self._runtime.layout
        fits = condition.misfit == 0
        vector = "in_flight" if purpose.late else "model"
        # A model of another form is not looked at: the verdict will refuse it.
        finite = ops.cond(
            fits,
            lambda: ops.where(self._store.finite(vector, purpose.fragment), 1.0, 0.0),
            lambda: ops.where(True, 1.0, 0.0),
        )
        counted = finite if config.nonfinite == "exclude" else 1.0
        plain = purpose.reason == AVERAGE or self._mixing.equal_weights

        def weight(fragment: int) -> Scalar:
            return counted * (1.0 if plain else progress.since[fragment] / (config.tau or 1) * purpose.counts)

        weights = tuple(weight(fragment) for fragment in range(layout.fragments))
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
        )
        if arrived:
            return Exchange(purpose, None, (), weights, counted, finite, condition, progress, arrived)
        parts = own_row(ops, comm.rank, comm.size, row, progress.rate_sums[at], clocks(ops, progress))
        ledger = comm.start_sum(names.ledger(self._count % self._slots), ops.pack([*parts, condition.moved]))
        self._count += 1
        exchange = Exchange(purpose, ledger, (), weights, counted, finite, condition, progress)
        chunks = self._chunks[purpose.fragment]
        first = chunks if purpose.at_once else () if purpose.ledger_alone else chunks[:1]
        return exchange._replace(started=tuple(self._start(chunk, exchange, fits) for chunk in first))

    def finish(self, exchange: Exchange) -> Meeting:
        """Wait for the ledger, and judge it.

        Raises:
            ValueError: on every worker, where the verdict has failed; nothing is written and nothing of this meeting is
                in flight.
        """
        ops, comm, config = self._ops, self._comm, self._runtime.config
        purpose, condition, layout = exchange.purpose, exchange.condition, self._runtime.layout
        ledger, *first = exchange.arrived or self.exchanged(exchange)
        everything = ops.unpack(ledger)
        judged, width = RATES + layout.group_count, row_length(layout)
        rows = ops.reshape(everything[: comm.size * width], (comm.size, width))
        table = rows[:, :judged]
        moved = everything[comm.size * width :]
        found = verdict(ops, table, config.nonfinite)
        totals = self._totals(exchange, rows[:, judged:], table, found)
        meeting = Meeting(exchange, rows, found, moved, totals, tuple(first))
        mixes = config.gossip is not None
        words = error_text(comm.ranks, comm.name, layout.names, condition.name, mixes)
        meeting = ops.error_if(found.failed, table, words, meeting)
        if self._runtime.watches:
            ops.warn("entered", found.entered, table, entry_warning(comm.ranks, comm.name, config))
        if purpose.reason == TRAINING:
            ops.warn("rates", found.rates_differ, table, rates_warning(comm.ranks, comm.name))
        if config.nonfinite == "exclude":
            words = exclusion_warning(comm.ranks, comm.name)
            ops.warn("excluded", found.counted < comm.size, table, words, always=True)
        return meeting

    def exchanged(self, exchange: Exchange) -> tuple[Any, ...]:
        """Wait for what has been started: nothing is in flight before the verdict is known."""
        return (self._comm.wait(exchange.ledger), *(self._arrived(handle) for handle in exchange.started))

    @property
    def slice_residuals(self) -> dict[int, Any]:
        """Residuals of this worker's slices, by chunk; see `TwoPhase`. They may be changed."""
        return {} if self._two_phase is None else self._two_phase.slice_residuals

    def discard(self, exchanges: Iterable[Exchange]) -> None:
        """Never finish these: they are dropped when the next one begins, since their names are taken until then."""
        self._discarded += exchanges

    def discard_relayed(self, meetings: Iterable[Meeting]) -> None:
        """Do as `discard` with exchanges in their second phase."""
        self._relays += [x for meeting in meetings for x in meeting.first if isinstance(x, CodedChunk)]

    @property
    def discarded(self) -> bool:
        """True while exchanges are in flight that nobody will finish."""
        return bool(self._discarded or self._relays)

    def drop_discarded(self) -> None:
        """Wait for the exchanges that nobody needs any more."""
        while self._discarded:
            exchange = self._discarded.pop(0)
            self._comm.wait(exchange.ledger)
            for handle in exchange.started:
                self._arrived(handle)
        while self._relays:
            self._comm.wait(self._relays.pop(0).handle)

    def sums(self, meeting: Meeting, roles: Sequence[Role]) -> Iterator[tuple[Chunk, Any, Scalar]]:
        """Yield each chunk, the workers' sum of it, and the divisor of the mean; the next chunk travels meanwhile.

        Chunks in few bits come in parts.
        """
        chunks = [chunk for chunk in self._chunks[meeting.exchange.purpose.fragment] if chunk.role in roles]
        arrived = list(meeting.first)[: len(chunks)]
        following = None if len(arrived) == len(chunks) or arrived else self._start_later(chunks[0], meeting)
        for number, chunk in enumerate(chunks):
            total = arrived[number] if number < len(arrived) else self._arrived(following)
            if len(arrived) <= number + 1 < len(chunks):
                following = self._start_later(chunks[number + 1], meeting)
            if isinstance(total, CodedChunk):
                yield from ((part, mean, 1.0) for part, mean in self._decoded(total, meeting))
            else:
                yield chunk, total, self.divisor(chunk, meeting)

    def relay(self, meeting: Meeting) -> Meeting:
        """Start the second phase of the means in few bits, once the first is over."""
        first = tuple(self._relayed(x, meeting) if isinstance(x, CodedChunk) else x for x in meeting.first)
        return meeting._replace(first=first)

    def _relayed(self, coded: CodedChunk, meeting: Meeting) -> CodedChunk:
        assert self._two_phase is not None, "only it makes coded chunks"
        weights = columns(meeting.table).weight
        return self._two_phase.relay(coded, weights, meeting.verdict.weight)

    def _decoded(self, coded: CodedChunk, meeting: Meeting) -> Iterator[tuple[Chunk, Any]]:
        """Yield the workers' mean of a chunk that travels in few bits, in parts."""
        assert self._two_phase is not None, "only it makes coded chunks"
        if coded.rest is None:
            coded = self._relayed(coded, meeting)
        exchange = meeting.exchange
        weight = exchange.weights[exchange.purpose.fragment or 0]
        return self._two_phase.finish(coded, weight, exchange.finite)

    def _arrived(self, handle: Any) -> Any:
        """Return the result of a chunk's sum; of one in few bits, the first phase."""
        if isinstance(handle, CodedChunk):
            assert self._two_phase is not None, "only it makes coded chunks"
            return self._two_phase.receive(handle)
        return self._comm.wait(handle)

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
        return self._ops.after(meeting.verdict.weight, lambda: self._start(chunk, meeting.exchange, True))

    def _start(self, chunk: Chunk, exchange: Exchange, fits: Scalar) -> Any:
        weight = exchange.counted if chunk.role == "optimizer_state" else exchange.weights[chunk.fragment]
        if fits is not True:
            weight = self._ops.cond(fits, lambda: weight * 1.0, lambda: weight * 0.0)
        coded = self._runtime.layout.segments[chunk.segment].coded
        if self._two_phase is not None and coded and exchange.purpose.fragment is not None:
            return self._two_phase.start(chunk, "in_flight" if exchange.purpose.late else "model", weight)

        def contribution() -> Any:
            if exchange.purpose.at_once:
                vector = "in_flight" if exchange.purpose.late else "model"
                return self._store.read(vector, chunk) * 1  # a copy, which the sum may use
            if chunk.role == "parameter":
                return self._mixing.contribution(chunk, exchange.progress.mixing)
            return self._store.read("model", chunk)

        def nothing() -> Any:
            zeros = self._store.zeros(chunk)
            return zeros * 1 if exchange.purpose.at_once else zeros  # whose memory is used again

        # Zeros where the weight is 0: an excluded worker's values may be NaN, and 0 x NaN is NaN.
        x = self._ops.weighted(weight, contribution, nothing)
        return self._comm.start_sum(names.model(chunk.index), x)
