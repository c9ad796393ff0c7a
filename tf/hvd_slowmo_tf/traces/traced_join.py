"""A join as one loop, in a trace or without: a worker that is done answers the others until all are done.

A trace costs seconds, and pays where the worker follows the others step by step; see `KerasWorker.join`.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from hvd_slowmo.core.average.gradient_average import Attendance, GradientAverage, Presence
from hvd_slowmo.core.parts.progress import Progress, Scalar
from hvd_slowmo.core.parts.schedule import StepPlan
from hvd_slowmo.core.regroup.join import take_part
from hvd_slowmo_tf.traces.gradients import VariableGradients
from hvd_slowmo_tf.traces.traced_step import TracedStep


def traced_join(step: TracedStep) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the join as a tf.function, whose `python_function` is the join without a trace.

    It takes a float64, 1 if this worker leaves for good, and returns everybody's.
    """

    def join(leaving: tf.Tensor) -> tf.Tensor:
        step.traces += tf.inside_function()
        worker = JoiningStep(step)
        # Micro-batches that wait for an update remain this worker's.
        waiting = step.optimizer._iterations._value % worker.calls_per_step
        left = take_part(step.assembly.machine, step.assembly.averages, worker, leaving)
        worker.count_calls(waiting)
        return left

    traced: Callable[[tf.Tensor], tf.Tensor] = tf.function(join, autograph=False)
    return traced


class JoiningStep:
    """`hvd_slowmo.core.regroup.join.JoiningWorker` in one trace, or without any."""

    def __init__(self, step: TracedStep) -> None:
        self._step = step
        self._nothing = [None] * len(step.trained)
        self._gradients: VariableGradients | None = None
        self.calls_per_step: int = step.optimizer.gradient_accumulation_steps or 1

    def read_progress(self) -> Progress:
        return self._step.variables.read()

    def write_progress(self, progress: Progress) -> None:
        self._step.variables.write(progress)

    def exchange_nothing(self, average: GradientAverage, leaving: Scalar) -> Attendance:
        self._gradients = VariableGradients(self._step.assembly.layout, self._step.trained, self._nothing)
        rates = tf.zeros([self._step.assembly.machine.layout.group_count], tf.float64)
        return average.exchange(self._gradients, Presence(training=0, leaving=leaving, rates=rates))

    def follow_step(self, attendance: Attendance, plan: StepPlan) -> None:
        step, machine, gradients = self._step, self._step.assembly.machine, self._gradients
        assert gradients is not None, "exchanged in the same pass of the loop"
        step.assembly.averages.level()
        step.averaged_step(self._nothing, gradients.means(), gradients.counts(), attendance.rates)
        progress = machine.after_inner_step(
            self.read_progress(), attendance.rates, training=0, catch_up_from=attendance.first
        )
        self.write_progress(progress)
        if step.acts_after_outer_step:
            changed = plan.lands if machine.config.delay else plan.outer
            machine.runtime.ops.cond(changed, step.after_outer_step, lambda: None)
        self._move_average()

    def outer_step_followed(self) -> None:
        self._step.after_outer_step()
        self._move_average()

    def hand_over(self, average: GradientAverage) -> None:
        """Leave the inner state as it is: a trace can't send it."""

    def count_calls(self, waiting: Scalar) -> None:
        """Set Keras' count of calls, `iterations`, from the count of steps and the calls since the last one."""
        steps = self.read_progress().step
        self._step.optimizer._iterations.assign(steps * self.calls_per_step + waiting)

    def _move_average(self) -> None:
        """Do as the others in the step that this worker takes along."""
        if self._step.optimizer.use_ema:
            self.count_calls(-1)
            self._step.move_average()
