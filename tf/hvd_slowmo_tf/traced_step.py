"""What TensorFlow traces: a step, a join, an average. One trace of each serves the whole training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.gradient_average import GradientMean
from hvd_slowmo.core.join import catch_up
from hvd_slowmo.core.ledger import RATES
from hvd_slowmo.core.machine import Machine
from hvd_slowmo.core.metrics import Metrics, metrics_of
from hvd_slowmo.core.mixing import Graph
from hvd_slowmo.core.progress import Observed
from hvd_slowmo.core.startup import Groups
from hvd_slowmo_tf.graph_comm import KeptComm
from hvd_slowmo_tf.inner_optimizer import Inner
from hvd_slowmo_tf.layout import Plan
from hvd_slowmo_tf.ops import TracedOps
from hvd_slowmo_tf.store import TfStore
from hvd_slowmo_tf.variables import State


def once(work: Callable[[], Any]) -> Any:
    """A trace for one call. TensorFlow would warn of the fifth tf.function that is made for a single call."""
    return tf.function(work, autograph=False).get_concrete_function()


class Engine:
    """The core's state machine on the variables of one optimizer.

    Args:
        optimizer: the SlowMo optimizer, built.
        inner: what it wraps.
        state: its state.
        comm: the workers.
        node: those of this worker's node, for gradients="node".
        graph: over a gossip base.
        plan: what travels.
        groups: the parameter groups that all workers have in common; None for one.
        observing: whether outer steps measure.
    """

    def __init__(
        self,
        optimizer: Any,
        inner: Inner,
        state: State,
        comm: Comm,
        node: Comm | None,
        graph: Graph | None,
        plan: Plan,
        groups: Groups | None,
        observing: bool,
    ) -> None:
        config: SlowMoConfig = optimizer.config
        self.config = config
        self.optimizer = optimizer
        self.inner = inner
        self.state = state
        self.variables = list(optimizer._trainable_variables)
        self._observing = observing
        self._explain = comm.link.explain if hasattr(comm, "link") else None
        self.comm = KeptComm(comm, timed=observing)
        self._node = None if node is None else KeptComm(node, timed=observing)
        self.plan, self.graph, self.groups = plan, graph, groups
        self.ops = TracedOps(optimizer.name, (comm.size, RATES + self.plan.layout.groups))
        for kept in filter(None, (self.comm, self._node)):
            kept.reserve(3 * len(self.plan.layout.chunks) + 4)
        store = TfStore(self.plan, inner, state.vectors)
        self._store = store
        self.machine = Machine(
            config, self.plan.layout, self.ops, store, self.comm, optimizer.name, observe=observing, graph=graph
        )
        self.of_all = GradientMean(self.plan.layout, self.ops, store, self.comm, optimizer.name)
        self.of_node = self.of_all
        if self._node is not None:
            self.of_node = GradientMean(self.plan.layout, self.ops, store, self._node, optimizer.name)
        with tf.init_scope():
            self._measured_at = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._measured = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)
            self._marks = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)
            # Since the last join, of all and of a node: whether a worker was done before others; one that was not, its
            # rank in there.
            self._uneven = {each: tf.Variable(False, trainable=False) for each in (self.of_all, self.of_node)}
            self._source = {each: tf.Variable(0, dtype=tf.int64, trainable=False) for each in self._uneven}
        self.mixed = False  # whether there are workers of other frameworks, once all have started
        self.traces = 0
        # The rows of an embedding's gradient are as many as the batch has: one trace for all numbers of them.
        self.step = tf.function(self._step, autograph=False, reduce_retracing=True)
        self._depart = tf.function(lambda: self.machine.depart(state.read()), autograph=False)

    def call(self, work: Any, *arguments: Any) -> Any:
        """A traced function, with its errors and warnings in plain words."""
        with self.ops.explained(self._explain):
            result = work(*arguments)
        self.ops.tell()
        return result

    def gather(self, what: str, item: Any) -> list[Any]:
        """Every worker's item, by rank. A collective."""
        return self.comm.gather(f"{self.optimizer.name}.{what}", item)

    @property
    def averages_gradients(self) -> bool:
        """Whether some step does."""
        return self.config.gradients != "local" or self.config.warmup_steps > 0

    @property
    def bytes_sent(self) -> int:
        """Bytes handed over for sums."""
        return self.comm.bytes_sent + (0 if self._node is None else self._node.bytes_sent)

    def metrics(self) -> Metrics | None:
        """Of the last outer step."""
        step = int(self._measured_at.numpy())
        if not step:
            return None
        sent, waited = self._measured.numpy().tolist()
        return metrics_of(Observed(*self.state.now.observed.tolist()), step, waited, int(sent))

    def depart(self, grads: Sequence[Any]) -> Any:
        """Over OSGP, before a step: what comes of the messages that the last one has set aside; else None.

        Within a function of batches it can begin when the batch is there, and run beside forward and backward.
        """
        if not self.config.overlap or not tf.inside_function():
            return None  # then it is sent within the step
        if self.optimizer.gradient_accumulation_steps:
            return None  # most calls are no step
        if self.of_node.size > 1 and self._node is not None:
            # A worker in its join answers its node first, and only then knows whether there is a step to send in. One
            # that waited for messages before it gives its gradients would wait for that worker, and that one for it.
            return None
        graph = tf.compat.v1.get_default_graph()
        captured = {id(x) for x in graph.internal_captures}  # these have a value without a batch
        given = [x for x in graph.inputs if x.dtype != tf.resource and id(x) not in captured]
        # Never without a batch: a dataset of unknown length makes a last call that has none.
        after = given or [x for g in grads if g is not None for x in tf.nest.flatten(g, expand_composites=True)]
        with tf.control_dependencies(after):
            return self._depart()

    # In traces

    def _step(self, grads: list[Any], came: Any = None) -> None:
        self.traces += 1
        # Everything waits for the gradients: with a dataset of unknown length there is a last call that has none.
        flat = [x for g in grads if g is not None for x in tf.nest.flatten(g, expand_composites=True)]
        optimizer = self.optimizer
        with tf.control_dependencies(flat):
            count = optimizer.gradient_accumulation_steps
            if count:
                due = tf.equal((optimizer._iterations._value + 1) % count, 0)
                tf.cond(due, lambda: self._accumulated_update(grads, count), lambda: self._accumulate(grads))
            else:
                self._update(grads, came)
            if optimizer.use_ema:  # like Keras, after each call and not after each update only
                self.move_average()
            optimizer._iterations.assign_add(1)

    def _accumulate(self, grads: list[Any]) -> None:
        for accumulator, g in zip(self.optimizer._accumulated_gradients, grads, strict=True):
            if g is not None:
                accumulator._value.assign_add(tf.convert_to_tensor(g))

    def _accumulated_update(self, grads: list[Any], count: int) -> None:
        accumulators = self.optimizer._accumulated_gradients
        self._update([None if g is None else (g + a._value) / count for a, g in zip(accumulators, grads, strict=True)])
        for a in accumulators:
            a.assign(tf.zeros(a.shape, a.dtype))

    def _update(self, grads: list[Any], came: Any = None) -> None:
        machine, state, optimizer = self.machine, self.state, self.optimizer
        rate = keras.ops.cast(optimizer._get_current_learning_rate(), "float64")
        rates = tf.fill([self.plan.layout.groups], rate)  # one group here, whatever others have
        if self.comm.size == 1:  # no broadcast has taken the first anchor
            tf.cond(tf.equal(state.read().step, 0), machine.take_anchor, lambda: None)
        now = machine.plan(state.read())
        source: Any = 0
        if self.averages_gradients and (self.comm.size > 1 or self.of_node.size > 1):
            own, (grads, counts, source) = grads, self._averaged(grads, rates, now)
            self.counted_base_step(own, grads, counts, rates)
        else:
            self.base_step(grads, rates)
        state.write(machine.tick(state.read(), rates, source=source, came=came))
        self.ops.cond(now.outer, self.after_outer, lambda: None)

    def base_step(self, grads: list[Any], rates: Any) -> None:
        """The inner optimizer's step; it has one rate, whatever the others have."""
        self.inner.set_rate(rates[0])
        self.inner.optimizer.apply(grads, self.variables)

    def counted_base_step(self, own: list[Any], grads: list[Any], counts: Any, rates: Any) -> None:
        """The same with averaged gradients. A variable that has none on any worker stays as it is, as it would alone.

        own: this worker's gradients; whether there is one for a variable is known here only where it is not None.
        counts: how many workers have one, (variables,).
        """
        open_ = [number for number, g in enumerate(own) if g is None]
        nothing = {number: tf.equal(counts[number], 0) for number in open_}

        def copy(number: int) -> Any:
            values = tf.reshape(self.variables[number].value, [-1])
            return tf.cond(nothing[number], lambda: tf.identity(values), lambda: values[:0])

        def restore(number: int) -> None:
            v = self.variables[number]
            tf.cond(nothing[number], lambda: v.assign(tf.reshape(before[number], v.shape)), lambda: v.value)

        before = {number: copy(number) for number in open_}
        self.base_step(grads, rates)
        for number in open_:
            restore(number)

    def exchange(self, exchange: GradientMean, grads: list[Any], live: int, leaving: Any, rates: Any) -> Any:
        """Gradients averaged over the workers, dense and one for each variable; how many have each; who took part."""
        self._store.set_gradients(self.variables, grads)
        exchange.send_rest(live, leaving, rates)
        attendance = exchange.finish()
        training = attendance.live > 0
        source, uneven = self._source[exchange], self._uneven[exchange]
        source.assign(tf.where(training, attendance.source, source))
        uneven.assign(uneven | (training & (attendance.live < exchange.size)))
        for other in self._uneven.keys() - {exchange}:  # the warm-up is over: all begin again from one start
            self._uneven[other].assign(False)
        return self._store.gradients(self.variables), self._store.counts(self.variables), attendance

    def catch_up(self, exchange: GradientMean) -> None:
        """All workers of an exchange are done."""
        comm = self.comm if exchange is self.of_all else self._node
        assert comm is not None, "gradients='node' comes with the node's workers"
        source, uneven = self._source[exchange].read_value(), self._uneven[exchange].read_value()
        catch_up(self.machine, self.ops, comm, uneven, source, comm is self.comm)
        self._uneven[exchange].assign(False)

    def _averaged(self, grads: list[Any], rates: Any, now: Any) -> tuple[list[Any], Any, Any]:
        own = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in grads]

        def over(exchange: GradientMean) -> Any:
            averaged, counts, attendance = self.exchange(exchange, own, 1, 0, rates)
            return averaged, counts, attendance.source

        def local() -> Any:
            dense = [tf.zeros(v.shape, v.dtype) if g is None else g for g, v in zip(own, self.variables, strict=True)]
            counts = tf.constant([float(g is not None) for g in own], tf.float64)
            return dense, counts, tf.constant(0, tf.int64)

        def average() -> Any:
            return self.ops.cond(now.all_gradients, lambda: over(self.of_all), lambda: over(self.of_node))

        averaged, counts, source = self.ops.cond(now.average_gradients, average, local)
        return list(averaged), counts, source

    def after_outer(self) -> None:
        """Constraints and measurements, of every worker that an outer step has changed."""
        # The inner optimizer's step has applied the constraints; averages and momentum may lead out of them again.
        if self.comm.size > 1 or self.config.vectors:
            for v in self.variables:
                if v.constraint is not None:
                    v.assign(v.constraint(v))
        if self._observing:
            totals = self.comm.counters if self._node is None else self.comm.counters + self._node.counters
            self._measured.assign(totals - self._marks)
            self._marks.assign(totals)
            self._measured_at.assign(self.state.read().step)

    def move_average(self) -> None:
        """The moving average of the weights (use_ema), of what the outer step has left."""
        optimizer = self.optimizer
        optimizer._update_model_variables_moving_average(self.variables)
        if optimizer.ema_overwrite_frequency:
            due = tf.equal((optimizer.iterations + 1) % optimizer.ema_overwrite_frequency, 0)
            tf.cond(due, lambda: optimizer._overwrite_model_variables_with_average_value(self.variables), lambda: None)
