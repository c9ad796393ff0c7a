"""The state machine: everything around an inner step, on any framework.

The state is two things: `Progress`, scalars that the transitions take and return by value; and named vectors ("model",
"anchor", "v") that the adapter's `Store` owns, and gives and takes a stretch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from hvd_slowmo.core.average.broadcast import take_from
from hvd_slowmo.core.average.exchange import PLAIN_AVERAGE, Purpose
from hvd_slowmo.core.average.ledger import Row, Verdict, clocks_of, columns
from hvd_slowmo.core.average.meeting import Meeting, Meetings
from hvd_slowmo.core.average.mixing import mixing_of
from hvd_slowmo.core.parts.progress import Observed, Progress, PushSum, Scalar, Vector
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.schedule import StepPlan, next_fragment, step_plan, steps_to_meeting
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.step.flights import Flights
from hvd_slowmo.core.step.outer_step import OuterSteps

T = TypeVar("T")

_STEPS, _ENDING = Row._fields.index("steps"), Row._fields.index("ending")


class Machine:
    """One worker's state machine. All workers call the same methods in the same order.

    Args:
        runtime: of this worker.
        graph: of the gossip between outer steps; None without.

    Attributes:
        keep: takes the state in the middle of a transition, where a loss may break off the rest.
    """

    def __init__(self, runtime: Runtime, graph: Graph | None = None) -> None:
        self.runtime = runtime
        self.config, self.layout = runtime.config, runtime.layout
        self._ops, self._store, self._comm = runtime.ops, runtime.store, runtime.comm
        self.mixing = mixing_of(graph, runtime)
        self._meetings = Meetings(runtime, self.mixing)
        self.outer_steps = OuterSteps(runtime, self._meetings, self.mixing)
        self.flights = Flights(runtime, self._meetings)
        self._fragments = range(runtime.layout.fragments)
        self.keep: Callable[[Progress], None] = lambda _: None

    @property
    def written(self) -> set[int] | None:
        """Numbers of the chunks that have been written of an outer step that was broken off; None if none was."""
        return self._meetings.written

    @written.setter
    def written(self, chunks: set[int] | None) -> None:
        self._meetings.written = chunks

    @property
    def unanswered(self) -> dict[int, Sequence[Any]]:
        """By chunk, this worker's new slices of an exchange whose result has not come; others may have it."""
        return self._meetings.unanswered

    @property
    def tracks(self) -> bool:
        """True if it notes what it has written, so that an outer step that is broken off can be completed."""
        return self._meetings.tracks

    @tracks.setter
    def tracks(self, value: bool) -> None:
        self._meetings.tracks = value

    def abandon(self) -> None:
        """Wait for what is in flight, whatever becomes of it: other workers take the place of these."""
        self.mixing.discard_in_flight()
        self.mixing.abandon()
        self.flights.discard()
        self._meetings.abandon()

    # Start

    def start(self) -> Progress:
        """Give everybody rank 0's vectors and take the first anchor, before the first inner step. A collective."""
        take_from(self.runtime, 0, ("parameter", "statistic", "optimizer_state"))
        self.outer_steps.take_anchor()
        self._store.settle(equal=True)
        return self.initial()

    def initial(self) -> Progress:
        """Return the scalar state before the first step."""
        ops, fragments, groups = self._ops, len(self._fragments), self.layout.group_count
        none = ops.to_int(ops.vector([0.0] * fragments))
        zeros = ops.reshape(ops.vector([0.0] * fragments * groups), (fragments, groups))
        nothing = ops.vector([0.0] * len(Observed._fields))
        mixing, flight = self.mixing.initial(), self.flights.initial()
        return Progress(0, none, none, zeros, zeros, excluded=0, observed=nothing, mixing=mixing, flight=flight)

    def restart(self, progress: Progress) -> Progress:
        """Give everybody rank 0's parameters and statistics, and begin a block there without momentum. A collective."""
        self.written = None
        self._meetings.drop_discarded()
        progress = self._each_in_flight(progress, self.flights.dropped)
        take_from(self.runtime, 0, ("parameter", "statistic"))
        self.outer_steps.begin_anew()
        self._store.settle(equal=True)
        self.outer_steps.begin_block(progress.step)
        return self.reset(progress)._replace(
            since=progress.since * 0, rate_steps=progress.rate_steps * 0, rate_sums=progress.rate_sums * 0
        )

    def reset(self, progress: Progress) -> Progress:
        """Return the state for workers that have all been given one worker's model: nothing is in flight."""
        self.flights.discard()
        return progress._replace(mixing=self.mixing.initial(), flight=self.flights.initial())

    def discard_in_flight(self) -> None:
        """Never use what is in flight: another state takes the place of this one. Waits for nothing."""
        self.mixing.discard_in_flight()
        self.flights.discard()
        self.written = None

    # A step

    def plan(self, progress: Progress) -> StepPlan:
        """Return the plan of the coming step."""
        return step_plan(self.config, progress.step)

    def exchange_pending(self, progress: Progress) -> Sequence[Any] | None:
        """Before an inner step: exchange what the last step has set aside, beside the computation.

        For adapters that can't have a collective in flight between two calls; `after_inner_step` takes the result.
        """
        plan = self.plan(progress)
        if not self.config.delay:
            return self.mixing.exchange_pending(progress.mixing, plan.mix)

        exchange = partial(self.flights.exchange, progress)
        flying = plan.lands & (progress.flight.launched[plan.landing] > 0)  # after a join there may be none
        return self._ops.cond(flying, lambda: self._of_fragment(plan.landing, exchange), self.flights.nothing)

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
        return self._after(progress, self.count(progress, rates), training, catch_up_from, arrivals)

    def pass_step(self, progress: Progress) -> Progress:
        """Count a step that this worker has missed, and run the exchanges that follow it."""
        return self._after(progress, progress._replace(step=progress.step + 1))

    def _after(
        self,
        before: Progress,
        done: Progress,
        training: int = 1,
        catch_up_from: Scalar = 0,
        arrivals: Sequence[Any] | None = None,
    ) -> Progress:
        """Mix, check and take the outer step after a step.

        Args:
            before: the state before the step.
            done: the same with the step counted.
            training, catch_up_from, arrivals: as in `after_inner_step`.
        """
        ops = self._ops
        now = self.plan(before)
        done = ops.cond(now.begin, lambda: self._end_warmup(done, catch_up_from), lambda: done)
        # Where no meeting follows, nothing in this step can take back a message: it may leave at once.
        at_once = ops.keeps_handles and not (now.outer or now.check) and self.plan(done).mix
        done = self._mix(done, now, before.step, arrivals, at_once)

        def outer(fragment: int) -> Progress:
            if self.config.delay:
                return self.flights.launch(done, fragment, training, self.keep)
            purpose = Purpose(
                training=training, counts=training, ledger_alone=not self.config.average, fragment=fragment
            )
            meeting = self._meetings.meet(done, done.step, purpose)
            self._called(meeting, done.step)
            return self.outer_steps.take(meeting, done)

        def check() -> Progress:
            meeting = self._meetings.meet(done, done.step, Purpose(training=training, ledger_alone=True))
            self._called(meeting, done.step)
            return meeting.exchange.progress

        self.flights.resume(before)
        if self.config.delay:
            land = partial(self._land, done, arrived=arrivals)
            flying = now.lands & (done.flight.launched[now.landing] > 0)  # after a join there may be none
            done = ops.cond(flying, lambda: self._of_fragment(now.landing, land), lambda: done)
        done = ops.cond(now.outer, lambda: self._of_fragment(now.fragment, outer), lambda: done)
        done = ops.cond(now.check, check, lambda: done)
        self.keep(done)
        return self._send_ahead(done, done.step)

    def complete(self, progress: Progress) -> Progress:
        """Apply all that is in flight, before its time. A collective."""
        self._meetings.drop_discarded()
        return self._each_in_flight(progress, self._land)

    def _each_in_flight(self, progress: Progress, work: Callable[[Progress, int], Progress]) -> Progress:
        """Do this with each fragment in flight, in the order in which they were launched."""
        ops = self._ops
        self.flights.resume(progress)
        for _ in range(self.flights.most):

            def first(progress: Progress = progress) -> Progress:
                return self._of_fragment(self.flights.first(progress.flight), partial(work, progress))

            def none(progress: Progress = progress) -> Progress:
                return progress

            flying = ops.sum(ops.where(progress.flight.launched > 0, 1.0, 0.0)) > 0
            progress = ops.cond(flying, first, none)
            self.keep(progress)
        return progress

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
        progress = self.complete(progress)
        fragment = next_fragment(self.config, progress.step)
        return self._of_fragment(fragment, lambda number: self._follow(progress, leaving, number))

    def _follow(self, progress: Progress, leaving: Scalar, fragment: int) -> tuple[Progress, Scalar, Vector]:
        """Follow to the meeting of this fragment, which is the next one."""
        ops = self._ops
        end = progress.step + steps_to_meeting(self.config, progress.step)
        averages = self.config.tau is not None and self.config.average
        progress = self._mix_on(progress, end - 1 if averages else end)
        # Without blocks there is no clock: the workers are all in their join, wherever they stopped.
        clock = 0 if self.config.tau is None and self.config.gossip is None else end
        alone = self.config.gossip is not None and not averages
        late = self.config.delay > 0
        purpose = Purpose(training=0, leaving=leaving, ledger_alone=alone, fragment=fragment, beside_late=late)
        try:
            meeting = self._meetings.meet(progress, clock, purpose)
        except ValueError:
            self._answer_launches(progress, end)
            raise
        self._called(meeting, end)
        progress, found = meeting.exchange.progress, meeting.verdict
        over = found.training == 0

        def all_done() -> Progress:
            if len(self._fragments) == 1 and not self.runtime.slices.chunks:
                return ops.cond(
                    found.weight > 0,
                    lambda: self.outer_steps.take_mean(meeting, progress),
                    lambda: nobody_has_steps(found),
                )
            # The meeting was about one fragment, or in slices. The others may have steps, and broken values.
            of_all = replace(purpose, ledger_alone=True, fragment=None, beside_late=False)
            whole = self._meetings.meet(progress, clock, of_all)
            some = ops.sum(ops.vector(whole.totals)) > 0
            return ops.cond(
                some, lambda: self.outer_steps.take_mean(whole, progress), lambda: nobody_has_steps(whole.verdict)
            )

        def nobody_has_steps(found: Verdict) -> Progress:
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
            return self.outer_steps.take_mean(self._meetings.meet(progress, clock, PLAIN_AVERAGE), progress)

        def go_on() -> Progress:
            there = progress._replace(step=end)
            if self.config.tau is None:
                return there
            return self.outer_steps.take(meeting, there)

        after = ops.cond(over, all_done, go_on)
        furthest = ops.argmax_row(meeting.table, _STEPS)
        clocks = clocks_of(ops, furthest, len(self._fragments), self.layout.group_count)
        joined = after._replace(
            step=ops.to_int(furthest[_STEPS]),
            since=after.since * 0,
            rate_steps=ops.to_int(clocks.rate_steps),
            rate_sums=clocks.rate_sums,
        )
        after = ops.cond(over, lambda: joined, lambda: after)
        return self._send_ahead(after, after.step), over, columns(meeting.table).leaving

    def _answer_launches(self, progress: Progress, step: Scalar) -> None:
        """Exchange, in a join, what the others launch before they learn that the meeting at this step has failed."""
        if self.config.delay < 2:
            return
        following = step + steps_to_meeting(self.config, step)
        while following < step + self.config.delay:
            fragment = next_fragment(self.config, following - 1)
            purpose = Purpose(training=0, fragment=fragment, beside_late=True)
            condition = self._store.condition(fragment)
            self._meetings.exchanged(self._meetings.begin(progress, following, purpose, condition))
            following += steps_to_meeting(self.config, following)

    def average(self, progress: Progress) -> None:
        """Set the model to the workers' plain mean; the state stays as it is. Nothing is in flight, see `complete`."""
        self._meetings.write_mean(self._meetings.meet(progress, progress.step, PLAIN_AVERAGE))

    # Within

    def _of_fragment(self, number: Scalar, work: Callable[[int], T]) -> T:
        """Return the result of `work` for this fragment."""
        return self._ops.switch(number, [partial(work, fragment) for fragment in self._fragments])

    def _land(self, progress: Progress, fragment: int, arrived: Sequence[Any] | None = None) -> Progress:
        """Apply the exchange of a fragment that is in flight."""
        meeting = self.flights.land(progress, fragment, arrived)
        # Since the launch a worker may have come to its join: only its wish to end is still true.
        self.runtime.roll.note_ending(self._ops.sum(meeting.table[:, _ENDING]))
        return self.flights.landed(self.outer_steps.take(meeting, progress), fragment)

    def _called(self, meeting: Meeting, step: Scalar) -> None:
        """Note who has come to a meeting."""
        self.runtime.roll.note(step, meeting.verdict.training, self._ops.sum(meeting.table[:, _ENDING]))

    def _end_warmup(self, progress: Progress, source: Scalar) -> Progress:
        """Begin the first block.

        All workers have made the same steps and should be equal. Clipping in front of a step that a worker in a join
        took without, or rates that differ, leave them unequal, and one anchor must serve all: so one worker's counts.
        """
        self._meetings.drop_discarded()
        take_from(self.runtime, source)
        self.outer_steps.take_anchor()
        self._store.settle()
        self.outer_steps.begin_block(progress.step)
        return progress._replace(
            since=progress.since * 0, rate_steps=progress.rate_steps * 0, rate_sums=progress.rate_sums * 0
        )

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
