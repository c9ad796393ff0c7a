"""A join, the same in every framework: a worker that is done answers the others' exchanges until all are done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from hvd_slowmo.core.average.broadcast import average_chunks, take_from
from hvd_slowmo.core.average.gradient_average import Attendance, GradientAverage, GradientAverages
from hvd_slowmo.core.parts.progress import Progress, Scalar, Vector
from hvd_slowmo.core.parts.schedule import StepPlan
from hvd_slowmo.core.regroup import following
from hvd_slowmo.core.step.machine import Machine


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
            lambda: answer(averages.of_all, plan, left),
            lambda: answer(averages.of_node, plan, left),
        )

    def answer(average: GradientAverage, plan: StepPlan, left: Vector) -> tuple[Scalar, Scalar, Vector]:
        attendance = worker.exchange_nothing(average, leaving)

        def all_done() -> tuple[Scalar, Scalar, Vector]:
            if average is averages.of_all:
                averages.level()
                worker.write_progress(machine.complete(worker.read_progress()))
            catch_up(machine, average, worker, average is averages.of_all)
            # A node whose workers are all done exchanges gradients no more, and goes on meeting the other nodes.
            return (False, False, attendance.leaving) if average is averages.of_all else (True, False, left)

        def step() -> tuple[Scalar, Scalar, Vector]:
            worker.follow_step(attendance, plan)
            return True, True, left

        return ops.cond(attendance.training == 0, all_done, step)

    def meet(exchanging: Scalar) -> tuple[Scalar, Scalar, Vector]:
        progress, over, left = following.follow(machine, worker.read_progress(), leaving)
        worker.write_progress(progress)
        ops.cond(over, lambda: None, worker.outer_step_followed)
        return ops.cond(over, lambda: False, lambda: True), exchanging, left

    def once(going: Scalar, exchanging: Scalar, left: Vector) -> tuple[Scalar, Scalar, Vector]:
        due = averages.due(machine.plan(worker.read_progress())) if averages.ever else False
        return ops.cond(due if due is False else due & exchanging, lambda: exchange(left), lambda: meet(exchanging))

    nobody = ops.vector([0.0] * machine.runtime.comm.size)
    _, _, left = ops.loop(lambda going, *_: going, once, (True, True, nobody))
    return left


class JoinsInThread(Protocol):
    """An adapter's part in a join that runs in a thread."""

    def caller_context(self) -> AbstractContextManager[Any]:
        """Return a context, to be entered in another thread, in which the framework works as it does here."""

    def averaged_ids(self) -> set[int]:
        """Return ids of the tensors that are averaged without being trained."""


class JoinsAlone(Protocol):
    """An optimizer of either framework."""

    worker: JoinsInThread

    def join(self, *, leaving: bool = False) -> JoinResult:
        """Wait for workers with more data."""


def join(*optimizers: JoinsAlone, leaving: bool = False) -> tuple[JoinResult, ...]:
    """Join with several optimizers at once: a worker that is done answers the exchanges of all of them. A collective.

    A worker that called `join()` on one optimizer after the other would answer the first one's exchanges only, while
    another worker waits in a step of the second. Here each optimizer's join runs in a thread of its own, so their
    exchanges may come in any order.

    Args:
        optimizers: SlowMo optimizers of one framework, the same ones on every worker.
        leaving: this worker stops for good.

    Returns:
        The result of each optimizer's join.

    Raises:
        TypeError: an argument is no SlowMo optimizer.
        ValueError: no optimizer, one twice, or two that average the same buffers; or as in `SlowMo.join`, on every
            rank.

    Example:
        >>> import torch
        >>> import hvd_slowmo.torch as slowmo
        >>> models = torch.nn.Linear(3, 1), torch.nn.Linear(1, 3)
        >>> inner = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
        >>> a, b = (slowmo.SlowMo(*each, slowmo.SlowMoConfig()) for each in zip(inner, models))
        >>> slowmo.join(a, b)
        (JoinResult(behind=0, left=()), JoinResult(behind=0, left=()))
    """
    for optimizer in optimizers:
        if not hasattr(optimizer, "averaged_parameters"):
            raise TypeError(
                f"join() takes SlowMo optimizers. Received: {type(optimizer).__name__}{_spell_wrapped(optimizer)}"
            )
    if not optimizers or len({id(optimizer.worker) for optimizer in optimizers}) < len(optimizers):
        raise ValueError(f"join() takes one or more different optimizers. Received: {len(optimizers)} of them.")
    seen: set[int] = set()
    for optimizer in optimizers:
        statistics = optimizer.worker.averaged_ids()
        if statistics & seen:
            raise ValueError(
                "two of the optimizers average the same buffers, which would end as another mean on each worker. Give "
                "each optimizer its own part of the model, or leave the buffers to one of them: "
                'SlowMo(..., statistics={"*": False}) for the others.'
            )
        seen |= statistics

    def call(optimizer: JoinsAlone) -> Callable[[], JoinResult]:
        context = optimizer.worker.caller_context()  # of this thread

        def joined() -> JoinResult:
            with context:
                return optimizer.join(leaving=leaving)

        return joined

    return _at_once([call(optimizer) for optimizer in optimizers])


def _spell_wrapped(wrapper: object) -> str:
    """Return the rest of a sentence about a wrapper of SlowMo (accelerate's, say), empty for any other object."""
    for name, value in getattr(wrapper, "__dict__", {}).items():
        if hasattr(value, "averaged_parameters"):
            return f", which wraps one. Give that one: join(optimizer.{name})."
    return ""


def _at_once(calls: Sequence[Callable[[], JoinResult]]) -> tuple[JoinResult, ...]:
    """Make all calls, each in a thread of its own, and return their results."""
    results: list[JoinResult | None] = [None] * len(calls)
    errors: list[BaseException] = []  # in the order in which they came: the first one is the cause

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:  # it belongs to the caller, whatever it is
            errors.append(error)

    # Daemons, so that an interrupt ends a process that waits for others.
    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return tuple(result for result in results if result is not None)


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
        statistics = [chunk for chunk in runtime.layout.chunks if chunk.role == "statistic"]
        ops.after(taken, lambda: average_chunks(runtime, statistics))
        runtime.store.settle(equal=True)
    average.forget()
