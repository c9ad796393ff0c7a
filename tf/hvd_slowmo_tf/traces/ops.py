"""`hvd_slowmo.core.parts.ops.Ops` in a TensorFlow trace.

A trace can neither raise ValueError nor log. Errors and warnings are kept in variables, and put into plain words where
Python runs again: by `TracedOps.call`, around every call of a traced function.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hvd_slowmo.core.parts.ops import TOPICS, Cell, Topic
from hvd_slowmo_tf.horovod import lost_worker
from hvd_slowmo_tf.traces.pieces import joined
from hvd_slowmo_tf.traces.shared import SharedTraces

C = TypeVar("C")
T = TypeVar("T")
Words = Callable[[NDArray[np.float64]], str]
Explain = Callable[[Exception], Exception]

LONG = 2**18
"""Elements of a tensor for which a choice between two is made by branches."""

logger = logging.getLogger("hvd_slowmo")


class TracedOps:
    """Scalars are tensors, or Python numbers where the settings alone decide.

    All variables are made here: a function that makes some in its first trace is traced twice.

    Args:
        name: of the optimizer, for messages.
        table: the shape of the ledger.
        explain: returns the exception to raise in place of a collective's error; None where the comm raises its own.
    """

    keeps_handles = False

    def __init__(self, name: str, table: tuple[int, int], explain: Explain | None = None) -> None:
        self._name = name
        self._explain = explain
        self._notes = {topic: _Note(table) for topic in TOPICS}
        self._error = _Note(table)
        self._shared = SharedTraces()

    def cell(self, value: bool | int) -> Cell:
        return _TracedCell(value)

    def loop(self, condition: Callable[..., Any], body: Callable[..., Any], state: tuple[Any, ...]) -> tuple[Any, ...]:
        state = tf.nest.map_structure(tf.convert_to_tensor, state)
        result: tuple[Any, ...] = tf.while_loop(condition, body, state, parallel_iterations=1)
        return result

    def matrices(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def take(self, array: NDArray[Any], index: tf.Tensor) -> tf.Tensor:
        return tf.constant(array)[index]

    def cond(self, predicate: Any, yes: Callable[[], T], no: Callable[[], T]) -> T:
        if not tf.is_tensor(predicate):  # fixed by the settings
            return yes() if predicate else no()
        result: T = tf.cond(predicate, yes, no)
        return result

    def switch(self, number: Any, branches: Sequence[Callable[[], T]]) -> T:
        if len(branches) == 1:
            return branches[0]()
        result: T = tf.switch_case(tf.cast(number, tf.int32), list(branches))
        return result

    def put(self, vector: tf.Tensor, index: int, value: Any) -> tf.Tensor:
        row = tf.cast(value, vector.dtype)
        if vector.shape[0] == 1:
            return row[None]
        here = np.arange(vector.shape[0]) == index
        return tf.where(here.reshape(-1, *[1] * (len(vector.shape) - 1)), row, vector)

    def where(self, predicate: Any, yes: Any, no: Any) -> tf.Tensor:
        if not tf.is_tensor(yes) and not tf.is_tensor(no) and {yes, no} == {0, 1}:
            return tf.cast(predicate if yes else tf.logical_not(predicate), tf.float64)
        return tf.where(predicate, _double(yes), _double(no))

    def choose(self, predicate: Any, yes: Callable[[], tf.Tensor], no: tf.Tensor) -> tf.Tensor:
        # Two branches take milliseconds to trace, and tf.where a pass over all elements.
        return tf.where(predicate, yes(), no) if no.shape[0] < LONG else self.cond(predicate, yes, lambda: no)

    def sum(self, table: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(table, axis=0)

    def columns(self, table: tf.Tensor) -> Sequence[tf.Tensor]:
        found: Sequence[tf.Tensor] = tf.unstack(table, axis=1)
        return found

    def vector(self, values: Sequence[Any]) -> tf.Tensor:
        if not any(map(tf.is_tensor, values)):
            return tf.constant(values, tf.float64, [len(values)])
        return tf.stack([_double(value) for value in values])

    def cast_like(self, scalar: Any, tensor: tf.Tensor) -> tf.Tensor:
        return tf.cast(scalar, tensor.dtype)

    def weighted(self, weight: Any, read: Callable[[], tf.Tensor], zeros: Callable[[], tf.Tensor]) -> tf.Tensor:
        if not tf.is_tensor(weight) and weight in (0, 1):  # fixed by the settings
            return read() if weight else zeros()
        x = read()  # not in a branch, which would have to bring all of the model's variables in
        return self.choose(weight != 1, lambda: tf.math.multiply_no_nan(x, tf.cast(weight, x.dtype)), x)

    def dot(self, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.tensordot(a, b, 1), tf.float64)

    def joined(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        return joined(parts)

    def to_int(self, scalar: Any) -> tf.Tensor:
        return tf.cast(scalar, tf.int64)

    def argmax_row(self, table: tf.Tensor, column: int) -> tf.Tensor:
        return table[tf.argmax(table[:, column])]

    def pack(self, parts: Sequence[Any]) -> tf.Tensor:
        runs = groupby(parts, lambda part: not tf.is_tensor(part) or part.shape.rank == 0)
        vectors = [each for alone, run in runs for each in ([self.vector(list(run))] if alone else map(_double, run))]
        return tf.concat(vectors, 0)

    def unpack(self, tensor: tf.Tensor) -> tf.Tensor:
        return tensor

    def reshape(self, scalars: tf.Tensor, shape: tuple[int, ...]) -> tf.Tensor:
        return tf.reshape(scalars, shape)

    def error_if(
        self,
        failed: tf.Tensor,
        table: tf.Tensor,
        describe: Words,
        guarded: T,
        undo: Callable[[], None] | None = None,
    ) -> T:
        self._error.always = True
        words = f"{self._name}: the workers can't go on; a row per worker (see hvd_slowmo/core/average/ledger.py):"

        def undone() -> tf.Tensor:
            assert undo is not None, "else nothing is undone"
            undo()
            return tf.identity(failed)

        before = [self._error.keep(failed, table, describe)]
        before += [] if undo is None else [tf.cond(failed, undone, lambda: tf.identity(failed))]
        with tf.control_dependencies(before):
            checked = tf.raw_ops.Assert(condition=~failed, data=[words, table], summarize=2**31 - 1)
        with tf.control_dependencies([checked] if tf.inside_function() else []):
            waiting: T = tf.nest.map_structure(lambda x: tf.identity(x) if tf.is_tensor(x) else x, guarded)
            return waiting

    def shared(self, key: str, work: Callable[[tf.Tensor], T], tensor: tf.Tensor) -> T:
        return self._shared.call(key, work, tensor)

    def after(self, scalar: tf.Tensor, work: Callable[[], T]) -> T:
        with tf.control_dependencies([scalar]):
            return work()

    def together(self, tensors: Sequence[T]) -> Sequence[T]:
        with tf.control_dependencies(list(tensors)):
            return [tf.identity(tensor) for tensor in tensors]

    def detached(self, work: Callable[[C], T]) -> Callable[[C], T]:
        return work  # it is in the trace: TensorFlow has threads of its own

    def attached(self, result: T) -> T:
        return result

    def warn(self, topic: Topic, holds: tf.Tensor, table: tf.Tensor, describe: Words, always: bool = False) -> None:
        note = self._notes[topic]
        note.always = always
        note.keep(holds, table, describe)

    def call(self, traced: Callable[..., Any], *arguments: Any) -> Any:
        """Call a traced function; raise its errors, and log its warnings, in plain words.

        Raises:
            ValueError: `error_if` has failed.
        """
        try:
            result = traced(*arguments)
        except tf.errors.InvalidArgumentError as error:
            words = self._error.news()
            if words is None:
                raise
            raise ValueError(words) from error
        except (tf.errors.UnknownError, tf.errors.FailedPreconditionError) as error:
            if self._explain is None or not lost_worker(error):
                raise
            raise self._explain(error) from error
        for note in self._notes.values():
            words = note.news()
            if words is not None:
                logger.warning("%s", words)
        return result


def _double(value: Any) -> tf.Tensor:
    """Return a float64 tensor, of a number by one operation."""
    return tf.cast(value, tf.float64) if tf.is_tensor(value) else tf.constant(value, tf.float64)


class _TracedCell:
    def __init__(self, value: bool | int) -> None:
        dtype = tf.bool if isinstance(value, bool) else tf.int64
        with tf.init_scope():
            self._variable = tf.Variable(value, dtype=dtype, trainable=False)

    def get(self) -> tf.Tensor:
        return self._variable.read_value()

    def set(self, value: Any) -> None:
        self._variable.assign(tf.cast(value, self._variable.dtype))


class _Note:
    """A table that a trace has set aside, and how to put it into words.

    It has a fixed shape: XLA, which may compile a worker alone, changes none.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.always = False
        self._words: list[Words] = []  # of each place in the traces that keeps a table
        self._told = 0
        self._shape = shape
        with tf.init_scope():
            self._count = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._place = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._table = tf.Variable(tf.zeros(shape, tf.float64), trainable=False)

    def keep(self, holds: tf.Tensor, table: tf.Tensor, describe: Words) -> tf.Operation:
        """Set the table aside if this holds; a smaller one is filled up with zeros.

        Without a tf.cond, each branch of which would be a trace of its own.
        """
        if tf.executing_eagerly() and not holds:
            return tf.no_op()
        self._words.append(describe)
        whole = tf.pad(table, [[0, most - size] for most, size in zip(self._shape, table.shape, strict=True)])
        table_now = self._table.assign(tf.where(holds, whole, self._table.value()))
        place = self._place.assign(tf.where(holds, tf.constant(len(self._words) - 1, tf.int64), self._place.value()))
        return tf.group(table_now, place, self._count.assign_add(tf.cast(holds, tf.int64)))

    def news(self) -> str | None:
        """Return the words for the last table if it is new, else None; only for the first one, unless always."""
        count = int(self._count.numpy())
        if count == self._told or (self._told and not self.always):
            return None
        self._told = count
        return self._words[int(self._place.numpy())](self._table.numpy())
