"""`SlowMo.join` as one loop in a trace: a worker that is done answers the others until all are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvd_slowmo.core.gradient_average import GradientMean
from hvd_slowmo.core.join import take_part
from hvd_slowmo_tf.traced_step import Engine


def make_join(engine: Engine) -> Callable[[Any], Any]:
    """A traced function of a float64 scalar, 1 if this worker leaves for good; it returns who does, (workers,)."""

    def join(leaving: Any) -> Any:
        engine.traces += 1
        optimizer, state = engine.optimizer, engine.state
        once = _Once(engine, leaving)
        # Micro-batches that wait for an update stay this worker's own.
        count = optimizer.gradient_accumulation_steps or 1
        waiting = optimizer._iterations._value % count
        nobody = tf.zeros([engine.comm.size], tf.float64)
        left = take_part(engine.ops, once.due, once.exchange, once.meet, nobody)
        optimizer._iterations.assign(state.read().step * count + waiting)
        return left

    return tf.function(join, autograph=False)  # type: ignore[no-any-return]


class _Once:
    """One pass of the loop: a meeting, or an exchange of gradients where the schedule has one."""

    def __init__(self, engine: Engine, leaving: Any) -> None:
        self._engine = engine
        self._leaving = leaving

    def due(self, node_done: Any) -> Any:
        engine = self._engine
        if not engine.averages_gradients:
            return False
        now = engine.machine.plan(engine.state.read())
        due = tf.convert_to_tensor(now.average_gradients) & ~node_done
        if engine.of_node.size == 1:  # nobody to exchange gradients with, but all
            due &= tf.convert_to_tensor(now.all_gradients)
        return due

    def meet(self) -> Any:
        after, over, left = self._engine.machine.idle(self._engine.state.read(), self._leaving)
        self._engine.state.write(after)
        self._engine.ops.cond(over, lambda: None, self._after_outer)
        return ~over, left

    def exchange(self, left: Any) -> Any:
        engine = self._engine
        now = engine.machine.plan(engine.state.read())
        return engine.ops.cond(
            now.all_gradients,
            lambda: self._follow(engine.of_all, now, left),
            lambda: self._follow(engine.of_node, now, left),
        )

    def _follow(self, exchange: GradientMean, now: Any, left: Any) -> Any:
        """Give zeros, and take the step that the others take, with their gradients and their rates."""
        engine = self._engine
        nothing: list[Any] = [None] * len(engine.variables)
        rates = tf.zeros([engine.plan.layout.groups], tf.float64)
        averaged, counts, attendance = engine.exchange(exchange, nothing, 0, self._leaving, rates)

        def done() -> Any:
            engine.catch_up(exchange)
            if exchange is engine.of_all:
                return tf.constant(False), tf.constant(False), attendance.leaving
            return tf.constant(True), tf.constant(True), left

        def step() -> Any:
            engine.counted_base_step(nothing, averaged, counts, attendance.rates)
            after = engine.machine.tick(engine.state.read(), attendance.rates, live=0, source=attendance.source)
            engine.state.write(after)
            engine.ops.cond(now.outer, engine.after_outer, lambda: None)
            self._move_average()
            return tf.constant(True), tf.constant(False), left

        return tf.cond(tf.equal(attendance.live, 0), done, step)

    def _after_outer(self) -> None:
        self._engine.after_outer()
        self._move_average()

    def _move_average(self) -> None:
        """As the others do in the step that this worker takes along."""
        optimizer = self._engine.optimizer
        if optimizer.use_ema:
            count = optimizer.gradient_accumulation_steps or 1
            optimizer._iterations.assign(self._engine.state.read().step * count - 1)
            self._engine.move_average()
