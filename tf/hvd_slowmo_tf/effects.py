"""Collectives that TensorFlow keeps as they are.

TensorFlow does not know that Horovod's operations have an effect: it folds one of a constant into its first result,
merges two of the same tensor into one, and drops one whose result nobody uses. Each of these leaves the other workers
waiting, or alone. So here every collective's input hangs on a variable of its own, and its end on one that is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_slowmo.comm import Comm

# Names that have a place of their own: 16 GiB of parameters. No tensor is sent under two names so far apart.
_PLACES = 1024


class _Started(NamedTuple):
    handle: Any
    elements: int
    size: int  # bytes
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
        # All variables are made here: a trace that makes one is thrown away and made again.
        self._places: dict[str, int] = {}
        with tf.init_scope():
            self._beginnings = tf.Variable([0] * _PLACES, dtype=tf.int64, trainable=False)
            self._sent = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this worker has handed over for sums."""
        return int(self._sent.numpy())

    @property
    def counters(self) -> Any:
        """In a trace: bytes sent and seconds waited, a float64 vector."""
        return tf.stack([tf.cast(self._sent, tf.float64), self._seconds.read_value()])

    def start_sum(self, name: str, x: Any) -> Any:
        elements = x.shape[0]
        if self.size == 1:
            return _Started(self._comm.start_sum(name, x), elements, 0, 0.0)
        # Where the slice begins is a variable: to TensorFlow x is no constant then, and like no other tensor. It begins
        # at 0, so that nothing is copied. (A tf.reshape to a variable's value is seen through: the lengths are equal.)
        x = tf.slice(x, self._beginning(name), tf.constant([elements], tf.int64))
        ready: Any = 0.0
        if self._timed:
            with tf.control_dependencies([x]):
                ready = tf.timestamp()
        return _Started(self._comm.start_sum(name, x), elements, elements * x.dtype.size, ready)

    def wait(self, handle: Any) -> Any:
        result = self._comm.wait(handle.handle)
        if self.size == 1:
            return result
        with tf.control_dependencies([result]):
            self._sent.assign_add(handle.size)  # has an effect that TensorFlow knows, and needs the result
            if self._timed:
                self._seconds.assign_add(tf.timestamp() - handle.ready)
        return tf.ensure_shape(result, [handle.elements])

    def gather(self, name: str, item: Any) -> list[Any]:
        return self._comm.gather(name, item)

    def _beginning(self, name: str) -> Any:
        """In a trace: zero, as a tensor that no other name has."""
        place = self._places.setdefault(name, len(self._places)) % _PLACES
        return self._beginnings.read_value()[place : place + 1]
