"""A meeting of all workers: the ledger, its verdict, and the mean of their parameters.

The ledger and the first chunk travel together. Nothing else starts and nothing is written before the verdict, so a
failed one raises on every worker with nothing left in flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hvd_slowmo.core import names
from hvd_slowmo.core.layout import Chunk
from hvd_slowmo.core.ledger import (
    AVERAGE,
    RATES,
    TRAINING,
    Row,
    Verdict,
    entry_warning,
    error_text,
    exclusion_warning,
    own_row,
    rates_warning,
    verdict,
)
from hvd_slowmo.core.mixing import Mixing
from hvd_slowmo.core.progress import Progress, Scalar
from hvd_slowmo.core.runtime import Runtime
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
    """

    training: int = 1
    counts: int = 1
    leaving: Scalar = 0
    reason: int = TRAINING
    ledger_alone: bool = False


PLAIN_AVERAGE = Purpose(reason=AVERAGE)
"""A meeting in which every worker weighs the same."""


class Meeting(NamedTuple):
    """A worker's knowledge once the verdict is known, before anything is written."""

    table: Any  # a row per worker, see `hvd_slowmo.core.ledger`
    verdict: Verdict
    finite: Scalar  # 1: this worker's parameters are
    moved: Any  # per parameter, the number of workers that may have moved it
    weights: Mapping[Role, Scalar]  # this worker's, per role of a segment
    first: Any  # the sum of the first chunk; None where the ledger came alone
    progress: Progress  # this worker's state


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

    def meet(self, progress: Progress, step: Scalar, purpose: Purpose) -> Meeting:
        """Exchange the ledger, and the first chunk beside it.

        Args:
            step: at which the workers meet; it must be the same on all.

        Raises:
            ValueError: on every worker, where the verdict has failed; nothing is written and nothing is in flight.
        """
        ops, comm, config = self._ops, self._comm, self._runtime.config
        exclude = config.nonfinite == "exclude"
        condition = self._store.condition()
        fits = condition.misfit == 0
        # A model of another form is not looked at: the verdict will refuse it.
        finite = ops.cond(fits, lambda: ops.where(self._store.finite(), 1.0, 0.0), lambda: ops.where(True, 1.0, 0.0))
        counted = finite if exclude else 1.0
        plain = purpose.reason == AVERAGE or self._mixing.equal_weights
        weight = counted * (1.0 if plain else progress.since / (config.tau or 1) * purpose.counts)
        row = Row(
            meeting_step=step,
            reason=purpose.reason,
            training=purpose.training,
            leaving=purpose.leaving,
            finite=finite,
            weight=weight,
            counted=counted,
            steps=progress.step,
            rate_steps=progress.rate_steps,
            misfit=condition.misfit,
            entered=condition.entered,
            drift=progress.observed[0],
        )
        parts = own_row(ops, comm.rank, comm.size, row, progress.rate_sums)
        handle = comm.start_sum(names.LEDGER, ops.pack([*parts, condition.moved]))
        weights: dict[Role, Scalar] = {"parameter": weight, "statistic": weight, "optimizer_state": counted}
        started = None
        if not purpose.ledger_alone:
            chunk = self._runtime.layout.chunks[0]
            own = ops.cond(fits, lambda: weights[chunk.role], lambda: 0.0)
            started = self._start(chunk, {chunk.role: own}, progress)
        everything = ops.unpack(comm.wait(handle))
        width = RATES + self._runtime.layout.group_count
        table = ops.reshape(everything[: comm.size * width], (comm.size, width))
        moved = everything[comm.size * width :]
        first = None if started is None else comm.wait(started)
        found = verdict(ops, table, config.nonfinite)
        meeting = Meeting(table, found, finite, moved, weights, first, progress)
        mixes = config.gossip is not None
        words = error_text(comm.ranks, comm.name, self._runtime.layout.names, condition.name, mixes)
        meeting = ops.error_if(found.failed, table, words, meeting)
        self._store.hold(meeting.moved)
        if self._runtime.watches:
            ops.warn("entered", found.entered, table, entry_warning(comm.ranks, comm.name, config))
        if purpose.reason == TRAINING:
            ops.warn("rates", found.rates_differ, table, rates_warning(comm.ranks, comm.name))
        if exclude:
            words = exclusion_warning(comm.ranks, comm.name)
            ops.warn("excluded", found.counted < comm.size, table, words, always=True)
        return meeting

    def sums(self, meeting: Meeting, roles: Sequence[Role]) -> Iterator[tuple[Chunk, Any, Any]]:
        """Yield each chunk, the workers' sum of it, and the divisor of the mean; the next chunk travels meanwhile."""
        found = meeting.verdict
        divisors = {"parameter": found.weight, "statistic": found.weight, "optimizer_state": found.counted}
        chunks = [chunk for chunk in self._runtime.layout.chunks if chunk.role in roles]
        total = self._comm.wait(self._start_later(chunks[0], meeting)) if meeting.first is None else meeting.first
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            handle = None if following is None else self._start_later(following, meeting)
            yield chunk, total, self._ops.cast_like(divisors[chunk.role], total)
            if following is not None:
                total = self._comm.wait(handle)

    def write_mean(self, meeting: Meeting) -> None:
        """Set the parameters and statistics to the workers' mean; nothing else changes."""
        for chunk, total, divisor in self.sums(meeting, ("parameter", "statistic")):
            self._store.write("model", chunk, self._runtime.kernels.divide(total, divisor))

    def _start_later(self, chunk: Chunk, meeting: Meeting) -> Any:
        """Start a chunk whose turn comes only once the verdict is known."""
        return self._ops.after(meeting.verdict.weight, lambda: self._start(chunk, meeting.weights, meeting.progress))

    def _start(self, chunk: Chunk, weights: Mapping[Role, Scalar], progress: Progress) -> Any:
        weight = weights[chunk.role]

        def contribution() -> Any:
            if chunk.role == "parameter":
                return self._mixing.contribution(chunk, progress.mixing)
            return self._store.read("model", chunk)

        # Zeros where the weight is 0: an excluded worker's values may be NaN, and 0 x NaN is NaN.
        x = self._ops.weighted(weight, contribution, lambda: self._store.zeros(chunk))
        return self._comm.start_sum(names.model(chunk.index), x)
