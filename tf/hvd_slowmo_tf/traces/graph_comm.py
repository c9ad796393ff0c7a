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

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import tensorflow as tf

from hvd_slowmo.comm.in_turn import InTurn
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo_tf.traces.pieces import joined

T = TypeVar("T")


class _Started(NamedTuple):
    handle: Any
    elements: int
    bytes: tf.Tensor | int
    ready: tf.Tensor | float  # time at which it could begin, s
    lengths: Sequence[int] | None = None  # of the parts in which the result is returned; None: as one


class _Done(NamedTuple):
    """An exchange beside the caller: within a trace all operations are."""

    result: Any


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
        self._last_started: InTurn[tf.Tensor] | None = None
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
        return self._start("sum", name, x, x.dtype.size * x.shape[0])

    def start_push(self, name: str, x: tf.Tensor, shares: tf.Tensor) -> _Started:
        receivers = 0 if self.size == 1 else tf.math.count_nonzero(shares[:, self.rank])
        return self._start("push", name, x, receivers * x.dtype.size * x.shape[0], shares)

    def start_alltoall(self, name: str, parts: Sequence[tf.Tensor]) -> _Started:
        lengths = [part.shape[0] for part in parts]
        own = lengths[self.rank]
        started = self._start(
            "alltoall", name, joined(parts), sum(lengths) - own, elements=own * self.size, cut=lengths
        )
        return started._replace(lengths=(own,) * self.size)

    def start_allgather(self, name: str, x: tf.Tensor, lengths: Sequence[int]) -> _Started:
        started = self._start("allgather", name, x, x.shape[0] * (self.size - 1), elements=sum(lengths), given=lengths)
        return started._replace(lengths=tuple(lengths))

    def open_beside(self) -> None:
        """Do nothing: an exchange beside the caller is a part of the trace."""

    def start_beside(self, work: Callable[[Comm], T]) -> _Done:
        return _Done(work(self))

    def wait(self, handle: _Started | _Done) -> Any:
        if isinstance(handle, _Done):
            return handle.result
        if isinstance(handle.handle, InTurn):
            result = handle.handle.result()
        else:
            result = self._arrived(handle.handle)
        if self.size == 1:
            return result if handle.lengths is None else [result]
        if not tf.executing_eagerly():
            # An effect that TensorFlow knows, and that needs the result.
            self._result.assign(tf.reduce_sum(tf.cast(result[:1], tf.float64)))
        with tf.control_dependencies([result]):
            self._sent.assign_add(handle.bytes)
            if self._timed:
                now = tf.timestamp()
                # Several may be in flight at a time: the seconds counted for one are not counted again for another.
                self._seconds.assign_add(tf.maximum(now - tf.maximum(handle.ready, self._last), 0.0))
                self._last.assign(now)
        result = tf.ensure_shape(result, [handle.elements])
        return result if handle.lengths is None else tf.split(result, handle.lengths)

    def gather(self, name: str, item: Any) -> list[Any]:
        return self._comm.gather(name, item)

    def _start(
        self,
        kind: Literal["sum", "push", "alltoall", "allgather"],
        name: str,
        x: tf.Tensor,
        sent: tf.Tensor | int,
        *shares: tf.Tensor,
        elements: int | None = None,
        cut: Sequence[int] | None = None,
        given: Sequence[int] | None = None,
    ) -> _Started:
        """Start a collective of one tensor.

        Args:
            sent: bytes.
            elements: of the result; None: as many as x has.
            cut: lengths of the parts in which x is given.
            given: lengths that are given beside it.
        """
        elements = x.shape[0] if elements is None else elements

        def start(x: tf.Tensor, *shares: tf.Tensor) -> Any:
            begin = getattr(self._comm, f"start_{kind}")
            return begin(name, x if cut is None else tf.split(x, cut), *shares, *([] if given is None else [given]))

        if self.size == 1:
            return _Started(start(x, *shares), elements, 0, 0.0)
        if not tf.executing_eagerly():
            x = self._protected(name, x)
            return _Started(start(x, *shares), elements, sent, self._now(x))
        key = kind, name, x.dtype, x.shape[0], tuple(cut or ()), tuple(given or ())
        if key not in self._alone:
            specs = [tf.TensorSpec(each.shape, each.dtype) for each in (x, *shares)]
            work = lambda *tensors: self._arrived(start(*tensors))  # noqa: E731
            # Without get_concrete_function TensorFlow would warn, as for HorovodComm's gathers.
            self._alone[key] = tf.function(work, input_signature=specs, autograph=False).get_concrete_function()
        ready = self._now(x)
        self._last_started = InTurn(partial(self._alone[key], x, *shares), self._last_started)
        return _Started(self._last_started, elements, sent, ready)

    def _arrived(self, handle: Any) -> tf.Tensor:
        """Return the result of a collective as one tensor."""
        result = self._comm.wait(handle)
        return joined(result) if isinstance(result, list) else result

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
