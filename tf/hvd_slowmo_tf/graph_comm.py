"""Collectives that TensorFlow keeps as they are.

TensorFlow does not know that Horovod's operations have an effect. Its optimizer of graphs folds an allreduce of a
constant into its first result, merges two of the same tensor, and drops one whose result is not used. Each of these
leaves the other workers waiting, or alone. So here every collective's input depends on a variable of its own, and a
variable is assigned a part of its result. A control dependency on the result alone is not enough: TensorFlow drops an
operation that is only waited for.

Outside of a trace (in a join, say) a collective is a traced function of its own, since TensorFlow has names in these
only. It runs in a thread, so that the next chunk travels while this one is updated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_slowmo.comm.protocol import Comm


class _Started(NamedTuple):
    handle: Any
    elements: int
    bytes: tf.Tensor | int
    ready: tf.Tensor | float  # time at which it could begin, s


class _InTurn(threading.Thread):
    """A call in a thread of its own, after another one: all workers start their collectives in one order.

    A daemon, so that an interrupt ends a process that waits for others. After an error nothing more is submitted.
    """

    def __init__(self, call: Callable[[], tf.Tensor], before: _InTurn | None) -> None:
        super().__init__(daemon=True)
        self._call: Callable[[], tf.Tensor] | None = call
        self._before = before
        self._result: tf.Tensor | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        # Nothing of a chunk's size is kept by the last one.
        (call, self._call), (before, self._before) = (self._call, None), (self._before, None)
        assert call is not None, "a thread runs once"
        try:
            if before is not None:
                before.finish()
            self._result = call()
        except BaseException as error:  # it belongs to the caller, whatever it is
            self._error = error

    def finish(self) -> None:
        """Wait until the call is over; raise its error."""
        self.join()
        if self._error is not None:
            raise self._error

    def result(self) -> tf.Tensor:
        """Wait, and take the result."""
        self.finish()
        result, self._result = self._result, None
        return result


class GraphSafeComm:
    """Another Comm on tensors of a trace or of none, safe from TensorFlow's optimizer of graphs, and metered.

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
        self._alone: dict[tuple[Any, ...], Callable[..., tf.Tensor]] = {}  # collectives that are functions of their own
        self._last_started: _InTurn | None = None
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
        return self._start("sum", name, x, x.dtype.size)

    def start_push(self, name: str, x: tf.Tensor, shares: tf.Tensor) -> _Started:
        receivers = 0 if self.size == 1 else tf.math.count_nonzero(shares[:, self.rank])
        return self._start("push", name, x, receivers * x.dtype.size, shares)

    def wait(self, handle: _Started) -> tf.Tensor:
        if isinstance(handle.handle, _InTurn):
            result = handle.handle.result()
        else:
            result = self._comm.wait(handle.handle)
        if self.size == 1:
            return result
        if not tf.executing_eagerly():
            self._result.assign(tf.cast(result[0], tf.float64))  # an effect that TensorFlow knows; needs the result
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

    def _start(self, kind: str, name: str, x: tf.Tensor, bytes_each: tf.Tensor | int, *shares: tf.Tensor) -> _Started:
        elements = x.shape[0]
        start = partial(getattr(self._comm, f"start_{kind}"), name)
        if self.size == 1:
            return _Started(start(x, *shares), elements, 0, 0.0)
        if not tf.executing_eagerly():
            x = self._protected(name, x)
            return _Started(start(x, *shares), elements, bytes_each * elements, self._now(x))
        key = kind, name, x.dtype, elements
        if key not in self._alone:
            specs = [tf.TensorSpec(each.shape, each.dtype) for each in (x, *shares)]
            work = lambda *given: self._comm.wait(start(*given))  # noqa: E731
            # Without get_concrete_function TensorFlow would warn, as for HorovodComm's gathers.
            self._alone[key] = tf.function(work, input_signature=specs, autograph=False).get_concrete_function()
        ready = self._now(x)
        self._last_started = _InTurn(partial(self._alone[key], x, *shares), self._last_started)
        return _Started(self._last_started, elements, bytes_each * elements, ready)

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
