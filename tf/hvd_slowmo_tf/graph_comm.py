"""Collectives that TensorFlow keeps as they are.

TensorFlow does not know that Horovod's operations have an effect. Its optimizer of graphs folds an allreduce of a
constant into its first result, merges two of the same tensor, and drops one whose result is not used. Each of these
leaves the other workers waiting, or alone. So here every collective's input depends on a variable of its own, and a
variable is assigned a part of its result. A control dependency on the result alone is not enough: TensorFlow drops an
operation that is only waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_slowmo.comm.protocol import Comm


class _Started(NamedTuple):
    handle: Any
    elements: int
    bytes: tf.Tensor | int
    ready: tf.Tensor | float  # time at which it could begin, s


class GraphSafeComm:
    """Another Comm on tensors of a trace, safe from TensorFlow's optimizer of graphs, and metered.

    Args:
        comm: the workers.
        names: of all collectives within a step. Their variables are made now: a function that makes variables in its
            first trace is traced twice.
        timed: count the seconds waited too.
    """

    def __init__(self, comm: Comm, names: Sequence[str] = (), *, timed: bool = False) -> None:
        self._comm = comm
        self._timed = timed
        self.rank, self.size, self.ranks = comm.rank, comm.size, comm.ranks
        self.node: GraphSafeComm | None = None if comm.node is None else GraphSafeComm(comm.node, names, timed=timed)
        self._beginnings: dict[str, tf.Variable] = {}
        if self.size > 1:
            for name in names:
                self._beginning(name)
        with tf.init_scope():
            self._sent = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
            self._last = tf.Variable(0.0, dtype=tf.float64, trainable=False)  # time at which a wait has ended, s
            self._result = tf.Variable(0.0, dtype=tf.float64, trainable=False)
            self._before = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)  # `counters` at the last lap
            self._lap = tf.Variable([0.0, 0.0, 0.0], dtype=tf.float64, trainable=False)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this worker has handed over, to the workers of its node too."""
        return int(self._sent.numpy()) + (0 if self.node is None else self.node.bytes_sent)

    @property
    def counters(self) -> tf.Tensor:
        """Bytes sent and seconds waited, a float64 vector, for the workers of the node too; in a trace."""
        own = tf.stack([tf.cast(self._sent, tf.float64), self._seconds.read_value()])
        return own if self.node is None else own + self.node.counters

    def lap(self, step: tf.Tensor) -> None:
        """Count bytes and seconds anew from this step on; in a trace."""
        totals = self.counters
        self._lap.assign(tf.concat([[tf.cast(step, tf.float64)], totals - self._before], 0))
        self._before.assign(totals)

    @property
    def last_lap(self) -> tuple[int, int, float]:
        """The step of the last lap, 0 before the first one; bytes sent and seconds waited in it."""
        step, sent, seconds = self._lap.numpy().tolist()
        return int(step), int(sent), seconds

    def start_sum(self, name: str, x: tf.Tensor) -> _Started:
        if self.size == 1:
            return _Started(self._comm.start_sum(name, x), x.shape[0], 0, 0.0)
        x = self._protected(name, x)
        return _Started(self._comm.start_sum(name, x), x.shape[0], x.shape[0] * x.dtype.size, self._now(x))

    def start_push(self, name: str, x: tf.Tensor, shares: tf.Tensor) -> _Started:
        if self.size == 1:
            return _Started(self._comm.start_push(name, x, shares), x.shape[0], 0, 0.0)
        x = self._protected(name, x)
        size = tf.math.count_nonzero(shares[:, self.rank]) * x.shape[0] * x.dtype.size
        return _Started(self._comm.start_push(name, x, shares), x.shape[0], size, self._now(x))

    def wait(self, handle: _Started) -> tf.Tensor:
        result = self._comm.wait(handle.handle)
        if self.size == 1:
            return result
        self._result.assign(tf.cast(result[0], tf.float64))  # has an effect that TensorFlow knows, and needs the result
        with tf.control_dependencies([result]):
            self._sent.assign_add(handle.bytes)
            if self._timed:
                now = tf.timestamp()
                # Several may be in flight at a time: the seconds counted for one are not counted again for another.
                self._seconds.assign_add(tf.maximum(now - tf.maximum(handle.ready, self._last), 0.0))
                self._last.assign(now)
        return tf.ensure_shape(result, [handle.elements])

    def gather(self, name: str, item: Any) -> list[Any]:
        return self._comm.gather(name, item)

    def _protected(self, name: str, x: tf.Tensor) -> tf.Tensor:
        # The beginning of the slice is a variable: to TensorFlow x is no constant then, and like no other tensor. Its
        # value is 0, so nothing is copied. (A tf.reshape to a shape in a variable is seen through: lengths are equal.)
        return tf.slice(x, self._beginning(name).read_value(), tf.constant([x.shape[0]], tf.int64))

    def _beginning(self, name: str) -> tf.Variable:
        if name not in self._beginnings:
            with tf.init_scope():
                self._beginnings[name] = tf.Variable([0], dtype=tf.int64, trainable=False)
        return self._beginnings[name]

    def _now(self, x: tf.Tensor) -> tf.Tensor | float:
        if not self._timed:
            return 0.0
        with tf.control_dependencies([x]):
            return tf.timestamp()
