"""The state machine: everything around an inner step, on any framework.

The state is two things: `Progress`, scalars that the transitions take and return by value; and named vectors ("model",
"anchor", "v") that the adapter's `Store` owns, and gives and takes a stretch at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvd_slowmo.core.broadcast import take_from
from hvd_slowmo.core.graph import Graph
from hvd_slowmo.core.layout import Tile
from hvd_slowmo.core.ledger import RATES, Row, columns
from hvd_slowmo.core.meeting import PLAIN_AVERAGE, Meeting, Meetings, Purpose
from hvd_slowmo.core.metrics import Observer
from hvd_slowmo.core.mixing import mixing_of
from hvd_slowmo.core.outer_update import Momentum, momentum, next_gamma
from hvd_slowmo.core.progress import Observed, Progress, PushSum, Scalar, Vector
from hvd_slowmo.core.runtime import Runtime
from hvd_slowmo.core.schedule import StepPlan, step_plan, steps_to_meeting

_STEPS = Row._fields.index("steps")


class Machine:
    """One worker's state machine. All workers call the same methods in the same order.

    Args:
        runtime: of this worker.
        graph: of the gossip between outer steps; None without.
    """

    def __init__(self, runtime: Runtime, graph: Graph | None = None) -> None:
        self.runtime = runtime
        self.config, self.layout = runtime.config, runtime.layout
        self._ops, self._store, self._comm = runtime.ops, runtime.store, runtime.comm
        # Elements to update at once, so that a processor's cache holds the temporaries.
        self._tiles = [tuple(chunk.tiles(runtime.kernels.tile)) for chunk in runtime.layout.chunks]
        self.mixing = mixing_of(graph, runtime)
        self._meetings = Meetings(runtime, self.mixing)

    # Start

    def start(self) -> Progress:
        """Give everybody rank 0's vectors and take the first anchor, before the first inner step. A collective."""
        take_from(self.runtime, 0, ("parameter", "statistic", "optimizer_state"))
        self.take_anchor()
        self._store.settle(equal=True)
        zeros = self._ops.vector([0.0] * self.layout.group_count)
        nothing = self._ops.vector([0.0] * len(Observed._fields))
        return Progress(0, 0, 0, zeros, zeros, excluded=0, observed=nothing, mixing=self.mixing.initial())

    def take_anchor(self) -> None:
        """Set the anchor to the model, if the outer step needs one: a block begins here."""
        if self.config.vectors:
            for chunk in self.layout.parameter_chunks:
                self._store.write("anchor", chunk, self._store.read("model", chunk))

    def begin_anew(self) -> None:
        """Set the anchor to the model, without momentum."""
        self.take_anchor()
        if "v" in self.config.vectors:
            for chunk in self.layout.parameter_chunks:
                self._store.write("v", chunk, self._store.read("v", chunk) * 0)

    def restart(self, progress: Progress) -> Progress:
        """Give everybody rank 0's parameters and statistics, and begin a block there without momentum. A collective."""
        take_from(self.runtime, 0, ("parameter", "statistic"))
        self.begin_anew()
        self._store.settle(equal=True)
        self._begin_block(progress.step)
        return self.reset(progress)._replace(
            since=progress.since * 0, rate_steps=progress.rate_steps * 0, rate_sums=progress.rate_sums * 0
        )

    def reset(self, progress: Progress) -> Progress:
        """Return the state for workers that have all been given one worker's model: no message is in flight."""
        return progress._replace(mixing=self.mixing.initial())

    # A step

    def plan(self, progress: Progress) -> StepPlan:
        """Return the plan of the coming step."""
        return step_plan(self.config, progress.step)

    def exchange_pending(self, progress: Progress) -> Sequence[Any] | None:
        """Before an inner step: exchange the messages that the last step has set aside, beside the computation.

        For adapters that can't have a collective in flight between two calls; `after_inner_step` takes the result.
        """
        return self.mixing.exchange_pending(progress.mixing, self.plan(progress).mix)

    def after_inner_step(
        self,
        progress: Progress,
        rates: Vector,
        *,
        training: int = 1,
        catch_up_from: Scalar = 0,
        arrivals: Sequence[Any] | None = None,
    ) -> Progress:
        """Count an inner step, mix, and take the outer step where it is due.

        Args:
            rates: float64 (G,), the learning rates of the inner step.
            training: 0 if the step was one of the other workers' gradients alone, in a join.
            catch_up_from: at the end of the warm-up, the worker whose parameters count.
            arrivals: result of `exchange_pending`.
        """
        ops = self._ops
        now = self.plan(progress)
        done = self.count(progress, rates)
        done = ops.cond(now.begin, lambda: self._end_warmup(done, catch_up_from), lambda: done)
        # Where no meeting follows, nothing in this step can take back a message: it may leave at once.
        at_once = ops.keeps_handles and not (now.outer or now.check) and self.plan(done).mix
        done = self._mix(done, now, progress.step, arrivals, at_once)

        def outer() -> Progress:
            purpose = Purpose(training=training, counts=training, ledger_alone=not self.config.average)
            meeting = self._meetings.meet(done, done.step, purpose)
            return self._outer_step(meeting, done) if self.config.average else self._outer_step_alone(meeting, done)

        def check() -> Progress:
            return self._meetings.meet(done, done.step, Purpose(training=training, ledger_alone=True)).progress

        done = ops.cond(now.outer, outer, lambda: done)
        done = ops.cond(now.check, check, lambda: done)
        return self._send_ahead(done, done.step)

    def count(self, progress: Progress, rates: Vector) -> Progress:
        """Count an inner step and its rates (G,): the whole of `after_inner_step` where the plan has no event."""
        return progress._replace(
            step=progress.step + 1,
            since=progress.since + 1,
            rate_steps=progress.rate_steps + 1,
            rate_sums=progress.rate_sums + rates,
        )

    # A join

    def follow(self, progress: Progress, leaving: Scalar = 0) -> tuple[Progress, Scalar, Vector]:
        """Come to the next meeting without data: a worker in a join answers the others until all are in theirs.

        Returns:
            The state; whether the join is over, a bool; who leaves, float64 (workers,). While it is not over, this
            worker has taken the others' outer step along. Once it is, all workers have their mean, weighted by the
            steps since the last average, and go on in the block of the one with the most steps.
        """
        ops = self._ops
        end = progress.step + steps_to_meeting(self.config, progress.step)
        averages = self.config.tau is not None and self.config.average
        progress = self._mix_on(progress, end - 1 if averages else end)
        # Without blocks there is no clock: the workers are all in their join, wherever they stopped.
        clock = 0 if self.config.tau is None and self.config.gossip is None else end
        alone = self.config.gossip is not None and not averages
        meeting = self._meetings.meet(progress, clock, Purpose(training=0, leaving=leaving, ledger_alone=alone))
        progress, found = meeting.progress, meeting.verdict
        over = found.training == 0

        def all_done() -> Progress:
            return ops.cond(found.weight > 0, lambda: self._mean(meeting, progress), nobody_has_steps)

        def nobody_has_steps() -> Progress:
            # Nothing to average, unless a worker with steps is excluded, or one was given other values: then their
            # parameters are not those of the others.
            reasons = [found.counted < self._comm.size] if self.config.nonfinite == "exclude" else []
            reasons += [found.entered] if self.runtime.watches else []
            needed = reasons[0] | reasons[1] if len(reasons) == 2 else reasons[0] if reasons else False
            return ops.cond(needed, plain_mean, stay)

        def stay() -> Progress:
            self._store.settle(equal=True)
            return progress

        def plain_mean() -> Progress:
            return self._mean(self._meetings.meet(progress, clock, PLAIN_AVERAGE), progress)

        def go_on() -> Progress:
            there = progress._replace(step=end)
            if self.config.tau is None:
                return there
            return self._outer_step(meeting, there) if self.config.average else self._outer_step_alone(meeting, there)

        after = ops.cond(over, all_done, go_on)
        furthest = ops.argmax_row(meeting.table, _STEPS)
        row = Row(*(furthest[number] for number in range(RATES)))
        joined = after._replace(
            step=ops.to_int(row.steps),
            since=after.since * 0,
            rate_steps=ops.to_int(row.rate_steps),
            rate_sums=furthest[RATES:],
        )
        after = ops.cond(over, lambda: joined, lambda: after)
        return self._send_ahead(after, after.step), over, columns(meeting.table).leaving

    def average(self, progress: Progress) -> None:
        """Set the model to the workers' plain mean; the state stays as it is."""
        self._meetings.write_mean(self._meetings.meet(progress, progress.step, PLAIN_AVERAGE))

    # Within

    def _end_warmup(self, progress: Progress, source: Scalar) -> Progress:
        """Begin the first block.

        All workers have made the same steps and should be equal. Clipping in front of a step that a worker in a join
        took without, or rates that differ, leave them unequal, and one anchor must serve all: so one worker's counts.
        """
        take_from(self.runtime, source)
        self.take_anchor()
        self._store.settle()
        self._begin_block(progress.step)
        return progress._replace(
            since=progress.since * 0, rate_steps=progress.rate_steps * 0, rate_sums=progress.rate_sums * 0
        )

    def _begin_block(self, decided: Scalar) -> None:
        """Reset the inner state (line 2 of Algorithm 1) once `decided` is known: nothing can be refused any more."""
        if self.config.inner_state == "reset" and self.config.tau is not None:
            self._ops.after(decided, self._store.reset_inner_state)

    def _mix(
        self,
        progress: Progress,
        now: StepPlan,
        clock: Scalar,
        arrivals: Sequence[Any] | None = None,
        at_once: Scalar = False,
    ) -> Progress:
        """Mix after the inner step with this number, where the plan has it."""
        hop = clock - self.config.warmup_steps

        def mixed() -> Progress:
            return progress._replace(mixing=self.mixing.mix(progress.mixing, hop, arrivals, at_once))

        return self._ops.cond(now.mix, mixed, lambda: progress)

    def _mix_on(self, progress: Progress, stop: Scalar) -> Progress:
        """Take part in the others' mixing up to a number of steps, in a join."""

        def once(clock: Scalar, state: PushSum) -> PushSum:
            done = self._mix(progress._replace(mixing=state), step_plan(self.config, clock), clock)
            return self._send_ahead(done, clock + 1, stop).mixing

        state = self.mixing.repeat(progress.mixing, progress.step, stop, once)
        return progress._replace(mixing=state)

    def _send_ahead(self, progress: Progress, clock: Scalar, stop: Scalar = None) -> Progress:
        """Start the messages that the next step mixes: the last act of a step.

        Args:
            stop: step at which the workers meet first, and may find that all are done.
        """
        if self._ops.keeps_handles and (stop is None or clock < stop):
            self.mixing.send_ahead(progress.mixing, step_plan(self.config, clock).mix)
        return progress

    def _outer_step(self, meeting: Meeting, progress: Progress) -> Progress:
        """Take lines 6 to 8 of Algorithm 1, and line 2 of the block that follows."""
        gamma = meeting.verdict.gamma
        coefficients = momentum(self.config, self._ops, gamma, progress.gamma)
        observer, divide = Observer(self.runtime, progress.observed), self.runtime.kernels.divide
        for chunk, total, divisor in self._meetings.sums(meeting, ("parameter", "statistic", "optimizer_state")):
            if self.runtime.observe and chunk.role == "parameter":
                total, divisor = total / divisor, 1  # the sum may lie where the own values are read to
                observer.chunk(chunk, total)
            if chunk.role == "parameter" and self.config.vectors:
                for tile in self._tiles[chunk.index]:
                    self._update(tile, divide(chunk.cut(total, tile), divisor), coefficients, meeting)
            else:
                self._store.write("model", chunk, divide(total, divisor))
        self._store.settle()
        self._begin_block(meeting.verdict.weight)
        done = self._without_excluded(meeting, progress)
        return self._block_done(done, gamma, observer.completed(meeting))._replace(
            since=progress.since * 0, mixing=self.mixing.initial()
        )

    def _outer_step_alone(self, meeting: Meeting, progress: Progress) -> Progress:
        """Take an outer step from this worker's own parameters, without the average (noaverage)."""
        gamma = progress.rate_sums / self._ops.where(progress.rate_steps > 0, progress.rate_steps, 1)
        coefficients = momentum(self.config, self._ops, gamma, progress.gamma)
        observer = Observer(self.runtime, progress.observed)
        for chunk in self.layout.parameter_chunks if self.config.vectors else ():
            if self.runtime.observe:  # there is no mean: measured from the own parameters
                observer.chunk(chunk, self._store.read("model", chunk))
            for tile in self._tiles[chunk.index]:
                z = self._update(tile, self._store.read("model", tile), coefficients, meeting)
                self.mixing.follow_outer_step(tile, z, progress.mixing)
        self._store.settle()
        self._begin_block(progress.step)
        return self._block_done(progress, gamma, observer.completed())

    def _block_done(self, progress: Progress, gamma: Vector, observed: Vector) -> Progress:
        return progress._replace(
            rate_steps=progress.rate_steps * 0,
            rate_sums=progress.rate_sums * 0,
            gamma=next_gamma(self._ops, gamma, progress.gamma),
            observed=observed,
        )

    def _update(self, tile: Tile, mean: Any, coefficients: Momentum, meeting: Meeting) -> Any:
        """Update a tile of the model, the anchor and v; return the new anchor."""
        anchor = self._store.read("anchor", tile)
        v = self._store.read("v", tile) if "v" in self.config.vectors else None
        written = self._store.written(tile, anchor)
        if written is not anchor:
            # The block began at what half precision kept of the anchor. The rounding is no progress of the block:
            # given back to the mean, it stays out of Delta = anchor - mean and so out of the momentum.
            own_mean, rounding = mean, anchor - written
            mean = mean + rounding
            if self.runtime.watches:  # values from outside have nothing to do with the old anchor
                mean = self._ops.choose(meeting.verdict.entered, lambda: own_mean, mean)
        if self.runtime.watches:  # values from outside are no progress of the block: it begins at the mean
            entered, mine = meeting.verdict.entered, v
            anchor = self._ops.choose(entered, lambda: mean + 0, anchor)
            v = None if mine is None else self._ops.choose(entered, lambda: mine * 0, mine)
        own = Momentum(*(self._ops.cast_like(c[tile.group], mean) for c in coefficients))
        anchor, v = self.runtime.kernels.outer_update(self.config, mean, anchor, v, own)
        self._store.write("model", tile, anchor)
        self._store.write("anchor", tile, anchor)
        if v is not None:
            self._store.write("v", tile, v)
        return anchor

    def _mean(self, meeting: Meeting, progress: Progress) -> Progress:
        """Set the parameters and statistics to the workers' mean; nothing else changes."""
        self._meetings.write_mean(meeting)
        if self.runtime.watches:
            self._ops.cond(meeting.verdict.entered, self.begin_anew, lambda: None)
        self._store.settle(equal=True)
        return self._without_excluded(meeting, progress)._replace(mixing=self.mixing.initial())

    def _without_excluded(self, meeting: Meeting, progress: Progress) -> Progress:
        """Reset the inner state of an excluded worker, which is stale beside the others' parameters."""
        if self.config.nonfinite != "exclude":
            return progress

        def start_again() -> Progress:
            if self.config.inner_state != "average":
                self._ops.after(meeting.finite, self._store.reset_inner_state)
            return progress._replace(excluded=progress.excluded + 1)

        return self._ops.cond(meeting.finite == 0, start_again, lambda: progress)
