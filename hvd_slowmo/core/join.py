"""A join, the same in every framework: a worker that is done answers the others' exchanges until all are done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from hvd_slowmo.core.broadcast import average_statistics, take_from
from hvd_slowmo.core.gradient_average import Attendance, GradientAverage, GradientAverages
from hvd_slowmo.core.machine import Machine
from hvd_slowmo.core.progress import Progress, Scalar, Vector
from hvd_slowmo.core.schedule import StepPlan


class JoinResult(NamedTuple):
    """Result of `SlowMo.join`.

    Example:
        >>> JoinResult(behind=3, left=()).behind
        3
    """

    behind: int  # steps by which this worker was behind the one with the most
    left: Sequence[int]  # ranks that have left for good: stop training


class JoiningWorker(Protocol):
    """An adapter's part in a join."""

    def read_progress(self) -> Progress:
        """Return the scalar state."""

    def write_progress(self, progress: Progress) -> None:
        """Replace the scalar state."""

    def exchange_nothing(self, average: GradientAverage, leaving: Scalar) -> Attendance:
        """Take part in an exchange of gradients with zeros, and keep the others' mean."""

    def follow_step(self, attendance: Attendance, plan: StepPlan) -> None:
        """Take the inner step that the others take, with their gradients and rates, and all that follows it."""

    def outer_step_followed(self) -> None:
        """Do what an adapter does behind an outer step, which has been taken along."""

    def hand_over(self, average: GradientAverage) -> None:
        """Give everybody the inner optimizer's state of `average.catch_up_from`, where that is possible."""


def take_part(machine: Machine, averages: GradientAverages, worker: JoiningWorker, leaving: Scalar) -> Vector:
    """Answer the others' exchanges in the order in which the schedule has them, until the join is over. A collective.

    Args:
        leaving: 1 if this worker leaves for good.

    Returns:
        Who leaves, float64 (workers,).
    """
    ops = machine.runtime.ops

    def exchange(left: Vector) -> tuple[Scalar, Scalar, Vector]:
        plan = machine.plan(worker.read_progress())
        return ops.cond(
            plan.all_gradients,
            lambda: follow(averages.of_all, plan, left),
            lambda: follow(averages.of_node, plan, left),
        )

    def follow(average: GradientAverage, plan: StepPlan, left: Vector) -> tuple[Scalar, Scalar, Vector]:
        attendance = worker.exchange_nothing(average, leaving)

        def all_done() -> tuple[Scalar, Scalar, Vector]:
            catch_up(machine, average, worker, average is averages.of_all)
            # A node whose workers are all done exchanges gradients no more, and goes on meeting the other nodes.
            return (False, False, attendance.leaving) if average is averages.of_all else (True, False, left)

        def step() -> tuple[Scalar, Scalar, Vector]:
            worker.follow_step(attendance, plan)
            return True, True, left

        return ops.cond(attendance.training == 0, all_done, step)

    def meet(exchanging: Scalar) -> tuple[Scalar, Scalar, Vector]:
        progress, over, left = machine.follow(worker.read_progress(), leaving)
        worker.write_progress(progress)
        ops.cond(over, lambda: None, worker.outer_step_followed)
        return ops.cond(over, lambda: False, lambda: True), exchanging, left

    def once(going: Scalar, exchanging: Scalar, left: Vector) -> tuple[Scalar, Scalar, Vector]:
        due = averages.due(machine.plan(worker.read_progress())) if averages.ever else False
        return ops.cond(due if due is False else due & exchanging, lambda: exchange(left), lambda: meet(exchanging))

    nobody = ops.vector([0.0] * machine.runtime.comm.size)
    _, _, left = ops.loop(lambda going, *_: going, once, (True, True, nobody))
    return left


def catch_up(machine: Machine, average: GradientAverage, worker: JoiningWorker, everyone: bool) -> None:
    """Make the workers of an exchange equal to the last one, once all of them are done. A collective of these workers.

    Those that were done earlier have taken its steps, but could not know what its script did to the gradients or the
    settings in between: clipping, say. Or their framework rounds differently.

    Args:
        everyone: these are all workers, which then average their statistics too.
    """
    ops, runtime = machine.runtime.ops, machine.runtime

    def take() -> Scalar:
        take_from(runtime, average.catch_up_from.get(), comm=average.comm)
        worker.hand_over(average)
        return ops.to_int(1.0)

    taken = ops.cond(average.stragglers.get(), take, lambda: ops.to_int(0.0))
    if everyone:
        ops.after(taken, lambda: average_statistics(runtime))
    average.forget()
