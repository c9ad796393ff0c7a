"""The state machine: what happens around a base step, on any framework.

State is two things. `Progress`, scalars passed by value through `start` and `tick`; and named vectors ("model",
"anchor", "v") that the adapter's `Store` owns and gives and takes a chunk at a time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.layout import Chunk, Layout
from hvd_slowmo.core.ledger import (
    AVERAGE,
    COVERED,
    DRIFT,
    LEAVING,
    RATES,
    TAKEN,
    TRAINING,
    Row,
    Verdict,
    complaint,
    exclusion,
    oddity,
    own_row,
    verdict,
)
from hvd_slowmo.core.mixing import Gossip, Graph, Mass
from hvd_slowmo.core.ops import Ops
from hvd_slowmo.core.outer_update import Momentum, momentum, next_gamma, outer_update
from hvd_slowmo.core.progress import Observed, Progress
from hvd_slowmo.core.schedule import Plan, plan, steps_to_meeting
from hvd_slowmo.core.store import Store


class Meeting(NamedTuple):
    """What a worker knows once the ledger is back and nothing is written yet."""

    table: Any  # a row per worker, see `Row`
    found: Verdict
    finite: Any  # 1: this worker's parameters are
    weights: Mapping[str, Any]  # this worker's, per rule of a segment
    first: Any  # the sum of the first chunk; None where the ledger came alone
    progress: Progress  # this worker's state


class Machine:
    """One worker's state machine. All workers call the same methods in the same order."""

    def __init__(
        self,
        config: SlowMoConfig,
        layout: Layout,
        ops: Ops,
        store: Store,
        comm: Comm,
        name: str,
        *,
        observe: bool = False,
        block: int | None = None,
        update: Callable[..., tuple[Any, Any]] = outer_update,
        divide: Callable[[Any, Any], Any] = operator.truediv,
        graph: Graph | None = None,
    ) -> None:
        self.config = config
        self._outer_update, self._divide = update, divide  # or an adapter's faster forms of them
        # Elements to update at once, so that a processor's cache holds what passes between them.
        self._blocks = [tuple(chunk.blocks(block)) for chunk in layout.chunks]
        self._observing = observe
        self.layout = layout
        self.name = name
        self._ops = ops
        self._store = store
        self._comm = comm
        self.gossip = None if graph is None else Gossip(graph, layout, ops, store, comm, name, block)

    def start(self) -> Progress:
        """Everybody gets rank 0's vectors; the first anchor is taken, before the first inner step."""
        self.take_from(0, ("slow", "mean", "base"))
        self.take_anchor()
        zeros = self._ops.vector([0.0] * self.layout.groups)
        nothing = self._ops.vector([0.0] * len(Observed._fields))
        return Progress(0, 0, 0, zeros, zeros, excluded=0, observed=nothing, **self._at_rest())

    def take_from(self, source: Any, rules: Sequence[str] = ("slow",), comm: Comm | None = None) -> None:
        """Everybody gets one worker's values of the segments with these rules, to the bit. comm: other than all."""
        comm = comm or self._comm
        for chunk in self.layout.chunks:
            if chunk.rule in rules:
                mine = self._ops.cond(
                    source == comm.rank,
                    partial(self._store.read, "model", chunk),
                    partial(self._store.zeros, chunk),
                )
                self._store.write("model", chunk, comm.wait(self._send(comm, chunk, mine)))

    def take_anchor(self) -> None:
        """The block begins where the model is, if the outer step needs to know."""
        if self.config.vectors:
            for chunk in self.layout.chunks:
                if chunk.rule == "slow":
                    self._store.write("anchor", chunk, self._store.read("model", chunk))

    def average_statistics(self) -> None:
        """The model's statistics become the workers' plain mean."""
        for chunk in self.layout.chunks:
            if chunk.rule == "mean":
                total = self._comm.wait(self._send(self._comm, chunk, self._store.read("model", chunk)))
                self._store.write("model", chunk, total / self._comm.size)

    def plan(self, progress: Progress) -> Plan:
        """What the coming step does."""
        return plan(self.config, progress.step)

    def tick(
        self, progress: Progress, rates: Any, live: int = 1, source: Any = 0, came: Sequence[Any] | None = None
    ) -> Progress:
        """After a base step with these learning rates, a float64 vector with one per parameter group.

        live: 0 if the step was one of the other workers' gradients alone, in a join.
        source: at the end of the warm-up, the worker whose parameters count.
        came: what `depart` has brought.
        """
        ops = self._ops
        now = self.plan(progress)
        done = progress._replace(
            step=progress.step + 1,
            since=progress.since + 1,
            covered=progress.covered + 1,
            rates=progress.rates + rates,
        )
        done = ops.cond(now.begin, lambda: self._begin(done, source), lambda: done)
        # Where no meeting follows, nothing in this step can take back what is set aside: it may leave at once.
        onward = self.gossip is not None and ops.holds and not (now.outer or now.check) and self.plan(done).mix
        done = self._mix(done, now, progress.step, came, onward)

        def outer() -> Progress:
            met = self._meet(done, done.step, live=live, counts=live, alone=not self.config.average)
            return self._outer(met, done) if self.config.average else self._outer_alone(met.progress)

        done = ops.cond(now.outer, outer, lambda: done)
        done = ops.cond(now.check, lambda: self._meet(done, done.step, live=live, alone=True).progress, lambda: done)
        return self._launched(done, done.step)

    def depart(self, progress: Progress) -> Sequence[Any] | None:
        """Where messages overlap with computation: before a base step, exchange what the last step has set aside.

        For adapters that can't have a collective under way between two calls; `tick` takes what it returns.
        """
        return None if self.gossip is None else self.gossip.depart(_mass(progress), self.plan(progress).mix)

    def idle(self, progress: Progress, leaving: int = 0) -> tuple[Progress, Any, Any]:
        """The next meeting, without data: a worker in a join answers the others until all are in theirs.

        Returns:
            The state; whether the join is over, a bool; who leaves, float64 (workers,). While it is not over, an outer
            step of the others has been taken along. Once it is, all workers have their mean, weighted by the steps
            since the last average, and go on in the block of the one with the most steps.
        """
        ops = self._ops
        end = progress.step + steps_to_meeting(self.config, progress.step)
        averages = self.config.tau is not None and self.config.average
        if self.gossip is not None:
            progress = self._mix_on(progress, end - 1 if averages else end)
        # Without blocks there is no clock: the workers are all in their join, wherever they stopped.
        clock = 0 if self.config.tau is None and self.gossip is None else end
        met = self._meet(progress, clock, live=0, leaving=leaving, alone=self.gossip is not None and not averages)
        progress = met.progress
        over = met.found.live == 0

        def all_done() -> Progress:
            return ops.cond(met.found.weight > 0, lambda: self._mean(met, progress), nobody_has_steps)

        def nobody_has_steps() -> Progress:
            # Nothing to average, unless one that took steps is left out: then it needs what the others have.
            if self.config.nonfinite != "exclude":
                return progress
            alike = met.found.attendance == self._comm.size
            return ops.cond(alike, lambda: progress, lambda: self._mean(self._meet_plainly(progress, clock), progress))

        def go_on() -> Progress:
            there = progress._replace(step=end)
            if self.config.tau is None:
                return there
            return self._outer(met, there) if self.config.average else self._outer_alone(there)

        after = ops.cond(over, all_done, go_on)
        furthest = ops.row_of_most(met.table, TAKEN)
        joined = after._replace(
            step=ops.integer(furthest[TAKEN]),
            since=after.since * 0,
            covered=ops.integer(furthest[COVERED]),
            rates=furthest[RATES:],
        )
        after = ops.cond(over, lambda: joined, lambda: after)
        return self._launched(after, after.step), over, met.table[:, LEAVING]

    def recall(self) -> None:
        """Another state takes the place of this one: forget what is under way on behalf of it."""
        if self.gossip is not None:
            self.gossip.recall()

    def midway(self, progress: Progress) -> bool:
        """Whether gossip is between two averages, with weights that differ or messages on their way; not in a trace."""
        return self.gossip is not None and not self.gossip.at_rest(_mass(progress))

    def settled(self, progress: Progress) -> Progress:
        """Where all workers have been given one worker's model: every weight is 1 and nothing is on its way."""
        return progress._replace(**self._at_rest())

    def average(self, progress: Progress) -> None:
        """The model becomes the workers' plain mean; the state stays as it is."""
        self._write_mean(self._meet_plainly(progress, progress.step))

    def _begin(self, progress: Progress, source: Any) -> Progress:
        """The warm-up is over and the first block begins.

        All workers have made the same steps and should be equal. Clipping in front of a step that a worker in a join
        took without, or rates that differ, leave them unequal, and one anchor must serve all: so one worker's counts.
        """
        self.take_from(source)
        self.take_anchor()
        self._begin_block(progress.step)
        return progress._replace(since=progress.since * 0, covered=progress.covered * 0, rates=progress.rates * 0)

    def _mix(
        self, progress: Progress, now: Plan, clock: Any, came: Sequence[Any] | None = None, onward: bool = False
    ) -> Progress:
        """After the base step with this number: gossip, where the base has it."""
        if self.gossip is None:
            return progress
        gossip, hop = self.gossip, clock - self.config.warmup_steps

        def mixed() -> Progress:
            return progress._replace(**gossip.mix(_mass(progress), hop, came, onward)._asdict())

        return self._ops.cond(now.mix, mixed, lambda: progress)

    def _mix_on(self, progress: Progress, stop: Any) -> Progress:
        """In a join: take part in the others' mixing, up to a number of steps."""

        def once(clock: Any, progress: Progress) -> tuple[Any, Progress]:
            done = self._mix(progress, plan(self.config, clock), clock)
            return clock + 1, self._launched(done, clock + 1, stop)

        _, progress = self._ops.loop(lambda clock, _: clock < stop, once, (progress.step, progress))
        return progress

    def _launched(self, progress: Progress, clock: Any, stop: Any = None) -> Progress:
        """The last thing of a step: messages that the next one mixes may leave now.

        stop: where the workers meet first, and may find that all are done.
        """
        if self.gossip is not None and self._ops.holds and (stop is None or clock < stop):
            self.gossip.launch(_mass(progress), plan(self.config, clock).mix)
        return progress

    def _at_rest(self) -> dict[str, Any]:
        """The fields of `Progress` about gossip, where every weight is 1 and nothing is on its way."""
        if self.gossip is not None:
            return self.gossip.rest()._asdict()
        nothing = self._ops.vector([])
        return Mass(nothing, nothing, self._ops.integer(0.0))._asdict()

    def _meet(
        self,
        progress: Progress,
        clock: Any,
        *,
        live: int = 1,
        counts: int = 1,
        leaving: int = 0,
        purpose: int = TRAINING,
        alone: bool = False,
    ) -> Meeting:
        """Come together with the other workers, and judge.

        The ledger and the first chunk travel together; nothing else starts and nothing is written before the ledger's
        verdict, so that a bad one raises on every worker with nothing left in flight.

        counts: 0 if this worker has only followed the others' steps, so that its parameters weigh nothing.
        alone: the ledger comes alone: whether an average follows is not known yet.
        """
        ops, comm = self._ops, self._comm
        exclude = self.config.nonfinite == "exclude"
        finite = ops.where(self._store.finite(), 1.0, 0.0)
        attends = finite if exclude else 1.0
        own = progress.since / (self.config.tau or 1)
        # Over a gossip base every worker weighs the same: mixing has spread the steps already.
        share = attends * (1.0 if purpose == AVERAGE or self.gossip is not None else own * counts)
        drift = progress.observed[0]
        row = Row(
            clock, purpose, live, leaving, finite, share, attends, progress.step, progress.covered, drift
        )  # fmt: skip
        handle = comm.start_sum(
            f"{self.name}.ledger", ops.pack(own_row(ops, comm.rank, comm.size, row, progress.rates))
        )
        weights = {"slow": share, "mean": share, "base": attends}
        begun = None if alone else self._start(self.layout.chunks[0], weights, progress)
        table = ops.reshape(ops.unpack(comm.wait(handle)), (comm.size, -1))
        first = None if begun is None else comm.wait(begun)
        found = verdict(ops, table, self.config.nonfinite)
        met = Meeting(table, found, finite, weights, first, progress)
        met = ops.refuse(found.bad, table, complaint(comm.ranks, self.name), met)
        if purpose == TRAINING:
            ops.warn("rates", found.odd, table, oddity(comm.ranks, self.name))
        if exclude:
            ops.warn("excluded", found.attendance < comm.size, table, exclusion(comm.ranks, self.name), always=True)
        return met

    def _outer(self, met: Meeting, progress: Progress) -> Progress:
        """Lines 6 to 8 of Algorithm 1, and line 2 of the block that follows."""
        coefficients = momentum(self.config, self._ops, met.found.gamma, progress.gamma)
        seen = progress.observed * 0
        for chunk, total, divisor in self._sums(met, ("slow", "mean", "base")):
            if self._observing and chunk.rule == "slow":
                total, divisor = total / divisor, 1  # the sum may lie where the own values are read to
                seen = seen + self._observe(chunk, total)
            if chunk.rule == "slow" and self.config.vectors:
                for block in self._blocks[chunk.index]:
                    part = chunk.cut(total, block)
                    self._update(block, self._divide(part, divisor), coefficients)
            else:
                self._store.write("model", chunk, self._divide(total, divisor))
        self._begin_block(met.found.weight)
        if self._observing:
            seen = seen + self._divergence(met, Observed(*[progress.observed[i] for i in range(len(Observed._fields))]))
        return self._without_excluded(met, progress)._replace(
            since=progress.since * 0,
            covered=progress.covered * 0,
            rates=progress.rates * 0,
            gamma=next_gamma(self._ops, met.found.gamma, progress.gamma),
            observed=seen,
            **self._at_rest(),
        )

    def _outer_alone(self, progress: Progress) -> Progress:
        """An outer step from this worker's own parameters, without the average (noaverage)."""
        assert self.gossip is not None, "settings refuse it over another base"
        gamma = progress.rates / self._ops.where(progress.covered > 0, progress.covered, 1)
        coefficients = momentum(self.config, self._ops, gamma, progress.gamma)
        w = self.gossip.weight(_mass(progress))
        seen = progress.observed * 0
        for chunk in self.layout.chunks if self.config.vectors else ():
            if chunk.rule == "slow":
                if self._observing:  # there is no mean: of the parameters here
                    seen = seen + self._observe(chunk, self._store.read("model", chunk))
                for block in self._blocks[chunk.index]:
                    self._update(block, self._store.read("model", block), coefficients, w)
        self._begin_block(progress.step)
        return progress._replace(
            covered=progress.covered * 0,
            rates=progress.rates * 0,
            gamma=next_gamma(self._ops, gamma, progress.gamma),
            observed=seen,
        )

    def _observe(self, chunk: Chunk, mean: Any) -> Any:
        """A chunk's part of what an outer step measures, before anything of it is written."""
        dot = self._ops.dot
        away = self._store.read("model", chunk) - mean
        parts = [dot(away, away), dot(mean, mean), 0.0, 0.0, 0.0, 0.0]
        if self.config.vectors:
            delta = self._store.read("anchor", chunk) - mean
            parts[3] = dot(delta, delta)
            if "v" in self.config.vectors:
                v = self._store.read("v", chunk)
                parts[4:] = [dot(v, v), dot(delta, v)]
        return self._ops.vector(parts)

    def _divergence(self, met: Meeting, before: Observed) -> Any:
        """What the ledger completes of the outer step before."""
        ops = self._ops
        known = before.mean > 0
        size = ops.where(known, before.mean, 1.0) * self._comm.size
        divergence = ops.where(known, ops.total(met.table[:, DRIFT]) / size, 0.0)
        return ops.vector([0.0, 0.0, divergence, 0.0, 0.0, 0.0])

    def _mean(self, met: Meeting, progress: Progress) -> Progress:
        """The parameters and statistics become the workers' mean, nothing else changes."""
        self._write_mean(met)
        return self._without_excluded(met, progress)._replace(**self._at_rest())

    def _write_mean(self, met: Meeting) -> None:
        for chunk, total, divisor in self._sums(met, ("slow", "mean")):
            self._store.write("model", chunk, self._divide(total, divisor))

    def _meet_plainly(self, progress: Progress, clock: Any) -> Meeting:
        """A meeting in which every worker weighs the same."""
        return self._meet(progress, clock, purpose=AVERAGE)

    def _without_excluded(self, met: Meeting, progress: Progress) -> Progress:
        """A worker that was left out has the others' parameters now; its base buffers are of no use with them."""
        if self.config.nonfinite != "exclude":
            return progress

        def start_again() -> Progress:
            if self.config.buffers != "average":
                self._ops.after(met.finite, self._store.reset_base)
            return progress._replace(excluded=progress.excluded + 1)

        return self._ops.cond(met.finite == 0, start_again, lambda: progress)

    def _start(self, chunk: Chunk, weights: Mapping[str, Any], progress: Progress) -> Any:
        weight = weights[chunk.rule]

        def own() -> Any:
            if chunk.rule == "slow" and self.gossip is not None:
                return self.gossip.mass(chunk, _mass(progress))
            return self._store.read("model", chunk)

        # Zeros where the weight is 0: what is left out may hold NaN, and 0 x NaN is NaN.
        x = self._ops.cond(
            weight > 0,
            lambda: self._ops.scaled(own(), weight),
            lambda: self._store.zeros(chunk),
        )
        return self._send(self._comm, chunk, x)

    def _send(self, comm: Comm, chunk: Chunk, x: Any) -> Any:
        return comm.start_sum(f"{self.name}.model.{chunk.index}", x)

    def _sums(self, met: Meeting, rules: Sequence[str]) -> Iterator[tuple[Chunk, Any, Any]]:
        """Each chunk, the workers' sum of it, and what makes it a mean; the next travels while the caller works."""
        divisors = {"slow": met.found.weight, "mean": met.found.weight, "base": met.found.attendance}
        chunks = [chunk for chunk in self.layout.chunks if chunk.rule in rules]
        total = self._comm.wait(self._started(chunks[0], met)) if met.first is None else met.first
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            handle = None if following is None else self._started(following, met)
            yield chunk, total, self._ops.like(divisors[chunk.rule], total)
            if following is not None:
                total = self._comm.wait(handle)

    def _started(self, chunk: Chunk, met: Meeting) -> Any:
        """A chunk whose turn comes only once the verdict is known."""
        return self._ops.after(met.found.weight, lambda: self._start(chunk, met.weights, met.progress))

    def _update(self, block: Chunk, mean: Any, coefficients: Momentum, w: Any = None) -> None:
        anchor = self._store.read("anchor", block)
        v = self._store.read("v", block) if "v" in self.config.vectors else None
        written = self._store.written(block, anchor)
        if written is not anchor:
            # The block began at what half precision kept of the anchor. What that dropped is no progress of the block:
            # given back to the mean, it stays out of Delta = anchor - mean and so out of the momentum.
            mean = mean + (anchor - written)
        mine = Momentum(*(self._ops.like(c[block.group], mean) for c in coefficients))
        anchor, v = self._outer_update(self.config, mean, anchor, v, mine)
        self._store.write("model", block, anchor)
        self._store.write("anchor", block, anchor)
        if v is not None:
            self._store.write("v", block, v)
        if w is not None and self.gossip is not None:
            self.gossip.keep(block, anchor, w)

    def _begin_block(self, known: Any) -> None:
        """Line 2. known: a scalar that there is only once nothing can be refused any more."""
        if self.config.buffers == "reset" and self.config.tau is not None:
            self._ops.after(known, self._store.reset_base)


def _mass(progress: Progress) -> Mass:
    return Mass(progress.w, progress.arriving, progress.flight)
