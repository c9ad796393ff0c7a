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
from hvd_slowmo.core.average.ledger import Row
from hvd_slowmo.core.average.meeting import Meeting, Meetings
from hvd_slowmo.core.average.mixing import mixing_of
from hvd_slowmo.core.parts.progress import Observed, Progress, Scalar, Vector
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
        mixing, meetings, outer_steps, flights: its parts, for workers that join or come together.
        keep: takes the state in the middle of a transition, where a loss may break off the rest.
        undone: takes the state that is left when a late exchange has failed: nothing is in flight.
    """

    def __init__(self, runtime: Runtime, graph: Graph | None = None) -> None:
        self.runtime = runtime
        self.config, self.layout = runtime.config, runtime.layout
        self._ops, self._store, self._comm = runtime.ops, runtime.store, runtime.comm
        self.mixing = mixing_of(graph, runtime)
        self.meetings = Meetings(runtime, self.mixing)
        self.outer_steps = OuterSteps(runtime, self.meetings, self.mixing)
        self.flights = Flights(runtime, self.meetings)
        self._fragments = range(runtime.layout.fragments)
        self.keep: Callable[[Progress], None] = lambda _: None
        self.undone: Callable[[Progress], None] = lambda _: None

    def abandon(self) -> None:
        """Wait for what is in flight, whatever becomes of it: other workers take the place of these."""
        self.mixing.discard_in_flight()
        self.mixing.abandon()
        self.flights.discard()
        self.meetings.abandon()

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
        self.meetings.written = None
        self.meetings.drop_discarded()
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
        self.meetings.written = None

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
        return self._ops.cond(flying, lambda: self.of_fragment(plan.landing, exchange), self.flights.nothing)

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
        done = self.mix(done, now, before.step, arrivals, at_once)

        def outer(fragment: int) -> Progress:
            if self.config.delay:
                return self.flights.launch(done, fragment, training, self.keep)
            purpose = Purpose(
                training=training, counts=training, ledger_alone=not self.config.average, fragment=fragment
            )
            meeting = self.meetings.meet(done, done.step, purpose)
            self.note_attendance(meeting, done.step)
            return self.outer_steps.take(meeting, done)

        def check() -> Progress:
            meeting = self.meetings.meet(done, done.step, Purpose(training=training, ledger_alone=True))
            self.note_attendance(meeting, done.step)
            return meeting.exchange.progress

        self.flights.resume(before)
        if self.config.delay:
            land = partial(self._land, done, arrived=arrivals, before=before)
            flying = now.lands & (done.flight.launched[now.landing] > 0)  # after a join there may be none
            done = ops.cond(flying, lambda: self.of_fragment(now.landing, land), lambda: done)
        done = ops.cond(now.outer, lambda: self.of_fragment(now.fragment, outer), lambda: done)
        done = ops.cond(now.check, check, lambda: done)
        self.keep(done)
        return self.send_ahead(done, done.step)

    def average(self, progress: Progress) -> None:
        """Set the model to the workers' plain mean; the state stays as it is. Nothing is in flight, see `complete`."""
        purpose = PLAIN_AVERAGE
        if self.config.delay:
            following = int(next_fragment(self.config, progress.step))
            purpose = replace(purpose, ledger_alone=True, beside_late=True, following=following)
        try:
            meeting = self.meetings.meet(progress, progress.step, purpose)
        except ValueError:
            self.flights.answer_launches(progress, progress.step + steps_to_meeting(self.config, progress.step))
            raise
        self.meetings.write_mean(meeting)

    def complete(self, progress: Progress) -> Progress:
        """Apply all that is in flight, before its time. A collective."""
        self.meetings.drop_discarded()
        return self._each_in_flight(progress, self._land)

    def _each_in_flight(self, progress: Progress, work: Callable[[Progress, int], Progress]) -> Progress:
        """Do this with each fragment in flight, in the order in which they were launched."""
        ops = self._ops
        self.flights.resume(progress)
        for _ in range(self.flights.most):

            def first(progress: Progress = progress) -> Progress:
                return self.of_fragment(self.flights.first(progress.flight), partial(work, progress))

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

    # Parts of a step, for a worker in a join too

    def of_fragment(self, number: Scalar, work: Callable[[int], T]) -> T:
        """Return the result of `work` for this fragment."""
        return self._ops.switch(number, [partial(work, fragment) for fragment in self._fragments])

    def _land(
        self,
        progress: Progress,
        fragment: int,
        arrived: Sequence[Any] | None = None,
        before: Progress | None = None,
    ) -> Progress:
        """Apply the exchange of a fragment that is in flight.

        Args:
            arrived: result of `exchange_pending`.
            before: the state before the step, which remains where the exchange has failed; None: that given.
        """

        def undo() -> None:
            self.undone(self.flights.withdrawn(before or progress))

        meeting = self.flights.land(progress, fragment, arrived, undo)
        # Since the launch a worker may have come to its join: only its wish to end is still true.
        self.runtime.roll.note_ending(self._ops.sum(meeting.table[:, _ENDING]))
        return self.flights.landed(self.outer_steps.take(meeting, progress), fragment)

    def note_attendance(self, meeting: Meeting, step: Scalar) -> None:
        """Note who has come to a meeting."""
        self.runtime.roll.note(step, meeting.verdict.training, self._ops.sum(meeting.table[:, _ENDING]))

    def _end_warmup(self, progress: Progress, source: Scalar) -> Progress:
        """Begin the first block.

        All workers have made the same steps and should be equal. Clipping in front of a step that a worker in a join
        took without, or rates that differ, leave them unequal, and one anchor must serve all: so one worker's counts.
        """
        self.meetings.drop_discarded()
        take_from(self.runtime, source)
        self.outer_steps.take_anchor()
        self._store.settle()
        self.outer_steps.begin_block(progress.step)
        return progress._replace(
            since=progress.since * 0, rate_steps=progress.rate_steps * 0, rate_sums=progress.rate_sums * 0
        )

    def mix(
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

    def send_ahead(self, progress: Progress, clock: Scalar, stop: Scalar = None) -> Progress:
        """Start the messages that the next step mixes: the last act of a step.

        Args:
            stop: step at which the workers meet first, and may find that all are done.
        """
        if self._ops.keeps_handles and (stop is None or clock < stop):
            self.mixing.send_ahead(progress.mixing, step_plan(self.config, clock).mix)
        return progress
