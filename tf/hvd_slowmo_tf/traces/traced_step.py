"""A step as TensorFlow traces it. One trace serves the whole training."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from hvd_slowmo.core.average.gradient_average import GradientAverage, Presence
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.parts.schedule import StepPlan
from hvd_slowmo.core.step.assembly import Assembly
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer
from hvd_slowmo_tf.model.layout import VariableRef, native
from hvd_slowmo_tf.model.variables import OptimizerVariables
from hvd_slowmo_tf.traces.gradients import VariableGradients
from hvd_slowmo_tf.traces.graph_comm import GraphSafeComm

Gradients = Sequence[tf.Tensor | tf.IndexedSlices | None]
"""A gradient for each variable that the optimizer trains; None where it has none."""


def tensors_in(grads: Gradients) -> list[tf.Tensor]:
    """Return the tensors of all gradients, the parts of sparse ones among them."""
    return [x for g in grads if g is not None for x in tf.nest.flatten(g, expand_composites=True)]


class TracedStep:
    """One worker's steps: the core's state machine around the inner optimizer, in a trace.

    The step count is a tensor here, so that each branch of the schedule is a tf.cond.

    Args:
        optimizer: SlowMo, built.
        inner: the optimizer that it wraps.
        variables: SlowMo's state.
        assembly: the core's parts.
        comm: the workers, as the core has them.
        elastic: after an exchange that fails the state tells how far the step has come.

    Attributes:
        function: the traced step, of the gradients and of the result of `exchange_pending`.
        traces: number of traces of the step and of the join.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        inner: InnerOptimizer,
        variables: OptimizerVariables,
        assembly: Assembly[VariableRef],
        comm: GraphSafeComm,
        elastic: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.variables = variables
        self.assembly = assembly
        self.comm = comm
        self.trained: list[keras.Variable] = list(optimizer._trainable_variables)
        self.traces = 0
        self._inner = inner
        self._elastic = elastic
        self._machine, self._ops = assembly.machine, assembly.runtime.ops
        # The rows of an embedding's gradient are as many as the batch has: one trace for all numbers of them.
        self.function = tf.function(self._step, autograph=False, reduce_retracing=True)
        self._pending = tf.function(lambda: self._machine.exchange_pending(variables.read()), autograph=False)

    def exchange_pending(self, grads: Gradients) -> list[tf.Tensor] | None:
        """Exchange what the last step has set aside: messages of OSGP, or a fragment that is one step late.

        Within a function of batches it can begin when the batch is there, and run beside forward and backward.

        Returns:
            Its results; None where nothing travels ahead.
        """
        graph, averages = self.assembly.graph, self.assembly.averages
        ahead = self._machine.runtime.config.delay > 0 or (graph is not None and graph.overlap)
        if not ahead or not tf.inside_function():
            return None  # then it is sent within the step
        if self.optimizer.gradient_accumulation_steps:
            return None  # most calls are no step
        config = self._machine.runtime.config
        if config.delay and config.gradients != "local":
            return None  # a worker in a join answers the exchange of gradients first
        if averages.of_node is not averages.of_all and averages.of_node.comm.size > 1:
            # A worker in a join answers its node first, and only then knows whether there is a step to send in. A
            # worker that waited for messages before it gives its gradients would wait for that one, and it for this.
            return None
        trace = tf.compat.v1.get_default_graph()
        captured = {id(x) for x in trace.internal_captures}  # these have a value without a batch
        inputs = [x for x in trace.inputs if x.dtype != tf.resource and id(x) not in captured]
        # Never without a batch: a dataset of unknown length makes a last call that has none.
        with tf.control_dependencies(inputs or tensors_in(grads)):
            received: list[tf.Tensor] = self._pending()
            return received

    def inner_step(self, grads: Gradients, rates: tf.Tensor) -> None:
        """Take the inner optimizer's step; it has one learning rate, whatever other frameworks have."""
        self._inner.set_rate(rates[0])
        self._inner.optimizer.apply(grads, self.trained)

    def averaged_step(self, own: Gradients, means: Sequence[tf.Tensor], counts: tf.Tensor, rates: tf.Tensor) -> None:
        """Take the inner step with averaged gradients; a variable without any keeps its value, as it would alone.

        So do its momentum and the like.

        Args:
            own: this worker's gradients; where one is not None, some worker is known to have one.
            means: the averaged gradients.
            counts: number of workers that have a gradient for each variable.
            rates: of this step.
        """
        unsure = [(number, v) for number, (g, v) in enumerate(zip(own, self.trained, strict=True)) if g is None]
        without = {number: tf.equal(counts[number], 0) for number, _ in unsure}

        def copy(number: int, v: keras.Variable) -> tf.Tensor:
            values = tf.reshape(v.value, [-1])
            return tf.cond(without[number], lambda: tf.identity(values), lambda: values[:0])

        def restore(number: int, v: keras.Variable, values: tf.Tensor) -> None:
            tf.cond(without[number], lambda: v.assign(tf.reshape(values, v.shape)), lambda: v.value)

        kept = [(n, each) for n, v in unsure for each in (v, *self._inner.slots_of(n, len(self.trained)))]
        before = [copy(number, v) for number, v in kept]
        self.inner_step(means, rates)
        for (number, v), values in zip(kept, before, strict=True):
            restore(number, v, values)

    @property
    def acts_after_outer_step(self) -> bool:
        """True if `after_outer_step` does anything."""
        return self._machine.runtime.observe or bool(self._constrained)

    def after_outer_step(self) -> None:
        """Apply constraints and measure, on every worker that an outer step has changed."""
        for v in self._constrained:
            v.assign(v.constraint(v))
        if self._machine.runtime.observe:
            self.comm.lap(self.variables.read().step)

    def move_average(self) -> None:
        """Update the moving average of the weights (use_ema) with the result of the outer step, as Keras does."""
        optimizer = self.optimizer
        optimizer._update_model_variables_moving_average(self.trained)
        if optimizer.ema_overwrite_frequency:
            due = tf.equal((optimizer.iterations + 1) % optimizer.ema_overwrite_frequency, 0)
            tf.cond(due, lambda: optimizer._overwrite_model_variables_with_average_value(self.trained), lambda: None)

    def _step(self, grads: Gradients, arrivals: Sequence[tf.Tensor] | None = None, compiled: bool = False) -> None:
        """Take a step, in a trace of its own where XLA compiles it: see `hvd_slowmo_tf.traces.in_place`."""
        self.traces += 1
        optimizer = self.optimizer
        # Everything waits for the gradients: with a dataset of unknown length there is a last call that has none.
        with tf.control_dependencies([tf.group(*tensors_in(grads))]):  # one edge to each operation, not hundreds
            count = optimizer.gradient_accumulation_steps
            if count:
                due = tf.equal((optimizer._iterations._value + 1) % count, 0)
                tf.cond(due, lambda: self._accumulated_update(grads, count), lambda: self._accumulate(grads))
            else:
                self._update(grads, arrivals)
            if optimizer.use_ema:  # after every call, as Keras, and not after every update only
                self.move_average()
            optimizer._iterations.assign_add(1)

    @property
    def _constrained(self) -> list[keras.Variable]:
        """Variables whose constraint averages and momentum can lead out of; the inner step has applied it."""
        runtime = self._machine.runtime
        changes = runtime.comm.size > 1 or bool(runtime.config.vectors)
        return [v for v in self.trained if v.constraint is not None] if changes else []

    def _accumulate(self, grads: Gradients) -> None:
        for accumulator, g in zip(self.optimizer._accumulated_gradients, grads, strict=True):
            if g is not None:
                accumulator._value.assign_add(tf.convert_to_tensor(g))

    def _accumulated_update(self, grads: Gradients, count: int) -> None:
        accumulators = self.optimizer._accumulated_gradients
        self._update([None if g is None else (g + a._value) / count for a, g in zip(accumulators, grads, strict=True)])
        for a in accumulators:
            a.assign(tf.zeros(a.shape, a.dtype))

    def _update(self, grads: Gradients, arrivals: Sequence[tf.Tensor] | None = None) -> None:
        machine, variables, averages = self._machine, self.variables, self.assembly.averages
        rates = self.rates()
        before = variables.read()  # the inner step leaves it as it is
        if machine.runtime.comm.size == 1:  # no start has taken the first anchor
            tf.cond(tf.equal(before.step, 0), machine.outer_steps.take_anchor, lambda: None)
        plan = machine.plan(before)
        due = averages.due(plan) if averages.ever else False
        first: tf.Tensor | int = 0
        # In an elastic job nothing of the inner step may be there if messages of others never come.
        ahead = list(arrivals or []) if self._elastic else []
        if due is False:
            with tf.control_dependencies(ahead):
                self.inner_step(grads, rates)
        else:
            own = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in grads]
            means, counts, first = self._averaged(own, rates, plan, due)
            averages.level()
            # Weight decay and counts do not depend on the means, and must not be there if these never come.
            with tf.control_dependencies([*means, counts, *ahead] if self._elastic else []):
                self.averaged_step(own, means, counts, rates)
        with tf.control_dependencies([self._note_made(before.step + 1)] if self._elastic else []):
            self._after_inner_step(before, rates, first, arrivals)

    def _note_made(self, step: tf.Tensor) -> tf.Operation:
        """Count the inner step once all that it changes is written."""
        written = [native(v).value() for v in (*self.trained, *self._inner.optimizer.variables)]
        with tf.control_dependencies(written):
            made: tf.Operation = tf.group(self.variables.made.assign(step))
            return made

    def _after_inner_step(
        self, before: Progress, rates: tf.Tensor, first: tf.Tensor | int, arrivals: Sequence[tf.Tensor] | None
    ) -> None:
        machine = self._machine
        plan = machine.plan(before)
        progress = machine.after_inner_step(before, rates, catch_up_from=first, arrivals=arrivals)
        # Which comes after an outer step's writes: a trace orders operations by the variables that they share.
        with tf.control_dependencies([native(self.trained[0]).value()] if self._elastic else []):
            self.variables.write(progress)
        if self.acts_after_outer_step:
            changed = plan.lands if machine.config.delay else plan.outer
            self._ops.cond(changed, self.after_outer_step, lambda: None)

    def finish(self) -> None:
        """Take what follows an inner step and was broken off, with other workers; without a trace."""
        self._after_inner_step(self.variables.read(), self.rates(), 0, None)
        if self.optimizer.use_ema:
            self.move_average()
        self.optimizer._iterations.assign_add(self.optimizer.gradient_accumulation_steps or 1)

    def rates(self) -> tf.Tensor:
        """Return the learning rate of the coming step, for each group: one here, whatever others have."""
        rate = keras.ops.cast(self.optimizer._get_current_learning_rate(), "float64")
        return tf.fill([self._machine.layout.group_count], rate)

    def _averaged(
        self, own: Sequence[tf.Tensor | None], rates: tf.Tensor, plan: StepPlan, due: tf.Tensor | bool
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """Return the averaged gradients, the number of workers that have each, and a worker that trains."""
        averages = self.assembly.averages

        def exchange(average: GradientAverage) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
            source = VariableGradients(self.assembly.layout, self.trained, own)
            attendance = average.exchange(source, Presence(training=1, leaving=0, rates=rates))
            return source.means(), source.counts(), attendance.first

        def exchanged() -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
            return self._ops.cond(
                plan.all_gradients, lambda: exchange(averages.of_all), lambda: exchange(averages.of_node)
            )

        def local() -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
            dense = [tf.zeros(v.shape, v.dtype) if g is None else g for g, v in zip(own, self.trained, strict=True)]
            counts = tf.constant([float(g is not None) for g in own], tf.float64)
            return dense, counts, tf.constant(0, tf.int64)

        return self._ops.cond(due, exchanged, local)
