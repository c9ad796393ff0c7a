"""`hvd_slowmo.core.ops.Ops` in a TensorFlow trace.

A trace can't raise ValueError nor log. What is wrong or worth a warning is kept in variables, and told in plain words
where Python runs again: `explained` around a call, `Notes.tell` after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tensorflow as tf

T = TypeVar("T")

logger = logging.getLogger("hvd_slowmo")


class TracedOps:
    """Scalars are tensors, or Python numbers where the settings alone decide.

    All variables are made here: a function that makes some in its first trace is traced twice.

    Args:
        name: of the optimizer, for messages.
        table: the shape of the workers' table that `refuse` and `warn` are given.
    """

    def __init__(self, name: str, table: tuple[int, int]) -> None:
        self.name = name
        self._notes = {topic: Note(table) for topic in ("rates", "excluded")}
        self._complaint = Note(table)

    holds = False

    def loop(self, condition: Callable[..., Any], body: Callable[..., Any], state: tuple[Any, ...]) -> tuple[Any, ...]:
        state = tf.nest.map_structure(tf.convert_to_tensor, state)
        result: tuple[Any, ...] = tf.while_loop(condition, body, state, parallel_iterations=1)
        return result

    def at(self, array: Any, index: Any) -> Any:
        return tf.constant(array)[index]

    def cond(self, predicate: Any, yes: Callable[[], T], no: Callable[[], T]) -> T:
        if not tf.is_tensor(predicate):  # fixed by the settings
            return yes() if predicate else no()
        result: T = tf.cond(predicate, yes, no)
        return result

    def where(self, predicate: Any, yes: Any, no: Any) -> Any:
        return tf.where(predicate, tf.cast(yes, tf.float64), tf.cast(no, tf.float64))

    def total(self, table: Any) -> Any:
        return tf.reduce_sum(table, axis=0)

    def vector(self, values: Sequence[Any]) -> Any:
        return tf.stack([tf.cast(value, tf.float64) for value in values]) if values else tf.zeros([0], tf.float64)

    def like(self, scalar: Any, tensor: Any) -> Any:
        return tf.cast(scalar, tensor.dtype)

    def scaled(self, tensor: Any, factor: Any) -> Any:
        return tensor if isinstance(factor, float) and factor == 1 else tensor * tf.cast(factor, tensor.dtype)

    def dot(self, a: Any, b: Any) -> Any:
        return tf.cast(tf.tensordot(a, b, 1), tf.float64)

    def integer(self, scalar: Any) -> Any:
        return tf.cast(scalar, tf.int64)

    def row_of_most(self, table: Any, column: int) -> Any:
        return table[tf.argmax(table[:, column])]

    def pack(self, parts: Sequence[Any]) -> Any:
        return tf.concat([tf.reshape(tf.cast(part, tf.float64), [-1]) for part in parts], 0)

    def unpack(self, tensor: Any) -> Any:
        return tensor

    def reshape(self, scalars: Any, shape: tuple[int, ...]) -> Any:
        return tf.reshape(scalars, shape)

    def refuse(self, bad: Any, table: Any, describe: Callable[[Any], str], guarded: T) -> T:
        self._complaint.describe, self._complaint.always = describe, True
        words = f"{self.name}: the workers can't go on; a row per worker (see hvd_slowmo/core/ledger.py):"

        def fail() -> Any:
            with tf.control_dependencies([self._complaint.keep(table)]):
                return tf.debugging.Assert(False, [words, table], summarize=-1)

        with tf.control_dependencies([tf.cond(bad, fail, tf.no_op)]):
            waiting: T = tf.nest.map_structure(lambda x: tf.identity(x) if tf.is_tensor(x) else x, guarded)
            return waiting

    def after(self, scalar: Any, work: Callable[[], T]) -> T:
        with tf.control_dependencies([scalar]):
            return work()

    def warn(self, topic: str, odd: Any, table: Any, describe: Callable[[Any], str], always: bool = False) -> None:
        note = self._notes[topic]
        note.describe, note.always = describe, always
        tf.cond(odd, lambda: note.keep(table), tf.no_op)

    def tell(self) -> None:
        """Log what has been worth a warning since the last time."""
        for note in self._notes.values():
            words = note.news()
            if words is not None:
                logger.warning("%s", words)

    @contextmanager
    def explained(self, explain: Callable[[Exception], Exception] | None = None) -> Iterator[None]:
        """Around a call of a traced function: its errors in plain words.

        explain: what to make of a collective's error.

        Raises:
            ValueError: what `refuse` was given.
        """
        try:
            yield
        except tf.errors.InvalidArgumentError as error:
            words = self._complaint.news()
            if words is None:
                raise
            raise ValueError(words) from error
        except (tf.errors.UnknownError, tf.errors.FailedPreconditionError) as error:
            if explain is None or "orovod" not in error.message:
                raise
            raise explain(error) from error


class Note:
    """A table that a trace has set aside, and how to put it into words.

    It has a fixed shape: XLA, which may compile a worker alone, changes none.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.describe: Callable[[Any], str] = str
        self.always = False
        self._told = 0
        with tf.init_scope():
            self._count = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._table = tf.Variable(tf.zeros(shape, tf.float64), trainable=False)

    def keep(self, table: Any) -> Any:
        """In a trace: set it aside."""
        return tf.group(self._table.assign(table), self._count.assign_add(1))

    def news(self) -> str | None:
        """The words for the last table, if there is one that was not told; only the first, unless always."""
        count = int(self._count.numpy())
        if count == self._told or (self._told and not self.always):
            return None
        self._told = count
        return self.describe(self._table.numpy())
