"""Measurements of outer steps, taken in traces."""

from __future__ import annotations

import tensorflow as tf

from hvd_slowmo.core.metrics import Metrics, metrics_of
from hvd_slowmo.core.progress import Observed, Vector
from hvd_slowmo_tf.graph_comm import GraphSafeComm


class Measurements:
    """Traffic and time since the outer step before, beside the measurements that the core takes.

    Args:
        comm: the workers, timed.
    """

    def __init__(self, comm: GraphSafeComm) -> None:
        self._comm = comm
        with tf.init_scope():
            self._step = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._counts = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)
            self._before = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)

    def take(self, step: tf.Tensor) -> None:
        """Measure an outer step that has just been taken; in a trace.

        Args:
            step: inner steps completed.
        """
        totals = self._comm.counters
        self._counts.assign(totals - self._before)
        self._before.assign(totals)
        self._step.assign(step)

    def last(self, observed: Vector) -> Metrics | None:
        """Return the measurements of the last outer step; None before the first one.

        Args:
            observed: of `Progress`.
        """
        step = int(self._step.numpy())
        if not step:
            return None
        sent, waited = self._counts.numpy().tolist()
        return metrics_of(Observed(*observed.tolist()), step, waited, int(sent))
