"""A worker in a join follows the others, from one meeting to the next."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

from hvd_slowmo.core.average.exchange import PLAIN_AVERAGE, Purpose
from hvd_slowmo.core.average.ledger import Row, Verdict, clocks_of, columns
from hvd_slowmo.core.average.meeting import Meeting
from hvd_slowmo.core.parts.progress import Progress, PushSum, Scalar, Vector
from hvd_slowmo.core.parts.schedule import next_fragment, step_plan, steps_to_meeting
from hvd_slowmo.core.step.machine import Machine

_STEPS = Row._fields.index("steps")


class Followed(NamedTuple):
    """The state after a meeting that a worker has come to without data."""

    progress: Progress
    over: Scalar  # a bool: no worker trains, and the join has ended
    leaving: Vector  # float64 (workers,), who leaves


def follow(machine: Machine, progress: Progress, leaving: Scalar = 0) -> Followed:
    """Come to the next meeting without data: a worker in a join answers the others until all are in theirs.

    While the join is not over, this worker has taken the others' outer step along. Once it is, all workers have their
    mean, weighted by the steps since the last average, and go on in the block of the one with the most steps.
    """
    progress = machine.complete(progress)
    fragment = next_fragment(machine.config, progress.step)
    return machine.of_fragment(fragment, partial(_follow, machine, progress, leaving))


def _follow(machine: Machine, progress: Progress, leaving: Scalar, fragment: int) -> Followed:
    """Follow to the meeting of this fragment, which is the next one."""
    ops, config = machine.runtime.ops, machine.config
    end = progress.step + steps_to_meeting(config, progress.step)
    averages = config.tau is not None and config.average
    progress = _mix_on(machine, progress, end - 1 if averages else end)
    # Without blocks there is no clock: the workers are all in their join, wherever they stopped.
    clock = 0 if config.tau is None and config.gossip is None else end
    purpose = Purpose(
        training=0,
        leaving=leaving,
        ledger_alone=config.gossip is not None and not averages,
        fragment=fragment,
        beside_late=config.delay > 0,
    )
    try:
        meeting = machine.meetings.meet(progress, clock, purpose)
    except ValueError:
        machine.flights.answer_launches(progress, end)
        raise
    machine.note_attendance(meeting, end)
    progress, over = meeting.exchange.progress, meeting.verdict.training == 0

    def go_on() -> Progress:
        there = progress._replace(step=end)
        return there if config.tau is None else machine.outer_steps.take(meeting, there)

    after = ops.cond(over, lambda: _average(machine, progress, meeting, clock), go_on)
    furthest = ops.argmax_row(meeting.table, _STEPS)
    clocks = clocks_of(ops, furthest, machine.layout.fragments, machine.layout.group_count)
    joined = after._replace(
        step=ops.to_int(furthest[_STEPS]),
        since=after.since * 0,
        rate_steps=ops.to_int(clocks.rate_steps),
        rate_sums=clocks.rate_sums,
    )
    after = ops.cond(over, lambda: joined, lambda: after)
    return Followed(machine.send_ahead(after, after.step), over, columns(meeting.table).leaving)


def _average(machine: Machine, progress: Progress, meeting: Meeting, clock: Scalar) -> Progress:
    """Take the mean at the end of the join."""
    ops = machine.runtime.ops

    def mean(of: Meeting, some: Scalar) -> Progress:
        return ops.cond(
            some,
            lambda: machine.outer_steps.take_mean(of, progress),
            lambda: _without_steps(machine, progress, of.verdict, clock),
        )

    if machine.layout.fragments == 1 and not machine.runtime.slices.chunks:
        return mean(meeting, meeting.verdict.weight > 0)
    # The meeting was about one fragment, or in slices. The others may have steps, and broken values.
    of_all = replace(meeting.exchange.purpose, ledger_alone=True, fragment=None, beside_late=False)
    whole = machine.meetings.meet(progress, clock, of_all)
    return mean(whole, ops.sum(ops.vector(whole.totals)) > 0)


def _without_steps(machine: Machine, progress: Progress, found: Verdict, clock: Scalar) -> Progress:
    """End a join in which no worker has a step to average.

    Nothing changes, unless a worker with steps is excluded, or one was given other values: then their parameters are
    not those of the others.
    """
    reasons = [found.counted < machine.runtime.comm.size] if machine.config.nonfinite == "exclude" else []
    reasons += [found.entered] if machine.runtime.watches else []
    needed = reasons[0] | reasons[1] if len(reasons) == 2 else reasons[0] if reasons else False

    def plain_mean() -> Progress:
        return machine.outer_steps.take_mean(machine.meetings.meet(progress, clock, PLAIN_AVERAGE), progress)

    def stay() -> Progress:
        machine.runtime.store.settle(equal=True)
        return progress

    return machine.runtime.ops.cond(needed, plain_mean, stay)


def _mix_on(machine: Machine, progress: Progress, stop: Scalar) -> Progress:
    """Take part in the others' mixing up to a number of steps."""

    def once(clock: Scalar, state: PushSum) -> PushSum:
        done = machine.mix(progress._replace(mixing=state), step_plan(machine.config, clock), clock)
        return machine.send_ahead(done, clock + 1, stop).mixing

    return progress._replace(mixing=machine.mixing.repeat(progress.mixing, progress.step, stop, once))
