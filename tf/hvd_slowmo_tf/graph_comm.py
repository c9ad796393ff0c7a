"""Collectives that TensorFlow keeps as they are.

TensorFlow does not know that Horovod's operations have an effect: it folds one of a constant into its first result,
merges two of the same tensor into one, and drops one whose result nobody uses. Each of these leaves the other workers
waiting, or alone. So here every collective's input hangs on a variable of its own, and a variable is given some of its
result: to wait for the result alone is not enough, TensorFlow takes an operation for void if all that follows it waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_slowmo.comm.protocol import Comm


class _Started(NamedTuple):
    handle: Any
    elements: int
    size: Any  # bytes
    ready: Any  # when it could begin, s


class KeptComm:
    """Another Comm on tensors of a trace, safe from the optimizer of graphs, and counted.

    Args:
        comm: the Comm.
        timed: count seconds too.
    """

    def __init__(self, comm: Comm, timed: bool = False) -> None:
        self._comm = comm
        self._timed = timed
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.ranks: Sequence[int] = comm.ranks
        self._beginnings: dict[str, Any] = {}
        self._spare: list[Any] = []
        with tf.init_scope():
            self._sent = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
            self._last = tf.Variable(0.0, dtype=tf.float64, trainable=False)  # when a wait has ended, s
            self._result = tf.Variable(0.0, dtype=tf.float64, trainable=False)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this worker has handed over for sums."""
        return int(self._sent.numpy())

    @property
    def counters(self) -> Any:
        """In a trace: bytes sent and seconds waited, a float64 vector."""
        return tf.stack([tf.cast(self._sent, tf.float64), self._seconds.read_value()])

    def start_sum(self, name: str, x: Any) -> Any:
        if self.size == 1:
            return _Started(self._comm.start_sum(name, x), x.shape[0], 0, 0.0)
        x = self._own(name, x)
        return _Started(self._comm.start_sum(name, x), x.shape[0], x.shape[0] * x.dtype.size, self._now(x))

    def start_push(self, name: str, x: Any, weights: Any) -> Any:
        if self.size == 1:
            return _Started(self._comm.start_push(name, x, weights), x.shape[0], 0, 0.0)
        x = self._own(name, x)
        size = tf.math.count_nonzero(weights) * x.shape[0] * x.dtype.size
        return _Started(self._comm.start_push(name, x, weights), x.shape[0], size, self._now(x))

    def _own(self, name: str, x: Any) -> Any:
        # Where the slice begins is a variable: to TensorFlow x is no constant then, and like no other tensor. It begins
        # at 0, so that nothing is copied. (A tf.reshape to a variable's value is seen through: the lengths are equal.)
        return tf.slice(x, self._beginning(name).read_value(), tf.constant([x.shape[0]], tf.int64))

    def _now(self, x: Any) -> Any:
        if not self._timed:
            return 0.0
        with tf.control_dependencies([x]):
            return tf.timestamp()

    def wait(self, handle: Any) -> Any:
        result = self._comm.wait(handle.handle)
        if self.size == 1:
            return result
        self._result.assign(tf.cast(result[0], tf.float64))  # has an effect that TensorFlow knows, and needs the result
        with tf.control_dependencies([result]):
            self._sent.assign_add(handle.size)
            if self._timed:
                now = tf.timestamp()
                # Several may be on their way at a time: what has been counted for one is not waited for twice.
                self._seconds.assign_add(tf.maximum(now - tf.maximum(handle.ready, self._last), 0.0))
                self._last.assign(now)
        return tf.ensure_shape(result, [handle.elements])

    def gather(self, name: str, item: Any) -> list[Any]:
        return self._comm.gather(name, item)

    def reserve(self, names: int) -> None:
        """Get ready for so many: a function that makes variables in its first trace is traced twice."""
        if self.size > 1:
            with tf.init_scope():
                self._spare += [tf.Variable([0], dtype=tf.int64, trainable=False) for _ in range(names)]

    def _beginning(self, name: str) -> Any:
        if name not in self._beginnings:
            if not self._spare:
                self.reserve(1)
            self._beginnings[name] = self._spare.pop()
        return self._beginnings[name]
