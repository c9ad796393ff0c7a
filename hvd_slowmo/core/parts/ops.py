"""The few operations on scalars that differ between plain Python and a traced graph.

Every decision that depends on data goes through these, so the state machine is written once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.core.parts.progress import Scalar, Vector

C = TypeVar("C")
T = TypeVar("T")

Topic: TypeAlias = Literal["rates", "excluded", "entered"]
"""Subjects of the warnings that a meeting can give."""
TOPICS: tuple[Topic, ...] = ("rates", "excluded", "entered")

logger = logging.getLogger("hvd_slowmo")


class Cell(Protocol):
    """A scalar that is kept between two calls."""

    def get(self) -> Scalar:
        """Return the value."""

    def set(self, value: Scalar) -> None:
        """Replace the value."""


class Ops(Protocol):
    """Operations on scalars: Python numbers or NumPy vectors; in a trace, tensors of both."""

    keeps_handles: bool
    """True if a collective can be in flight between two calls of the state machine."""

    def cell(self, value: bool | int) -> Cell:
        """Return a new cell with this value."""

    def loop(self, condition: Callable[..., Any], body: Callable[..., Any], state: tuple[Any, ...]) -> tuple[Any, ...]:
        """Repeat `state = body(*state)` while `condition(*state)`; structures and types stay the same."""

    def matrices(self, array: NDArray[Any]) -> Any:
        """Return matrices (n, m, m) for `take`: one is multiplied by columns (`@`), and given to a push."""

    def take(self, array: Any, index: Scalar) -> Any:
        """Return an entry of a NumPy array along its first axis, or of `matrices`."""

    def cond(self, predicate: Scalar, yes: Callable[[], T], no: Callable[[], T]) -> T:
        """Return the result of one of two functions, which return scalars of the same structure and types."""

    def switch(self, number: Scalar, branches: Sequence[Callable[[], T]]) -> T:
        """Return the result of one of several functions, which return scalars of the same structure and types."""

    def put(self, vector: Vector, index: int, value: Any) -> Vector:
        """Return a copy of a vector or a table with another entry, or row."""

    def where(self, predicate: Any, yes: Any, no: Any) -> Any:
        """Choose element by element; both sides are computed."""

    def choose(self, predicate: Scalar, yes: Callable[[], Any], no: Any) -> Any:
        """Return a tensor, or another one of the same form in its place."""

    def sum(self, table: Any) -> Any:
        """Sum over the first axis."""

    def columns(self, table: Any) -> Sequence[Vector]:
        """Return the columns of a table, in a trace by one operation."""

    def vector(self, values: Sequence[Scalar]) -> Vector:
        """Return a float64 vector of scalars."""

    def cast_like(self, scalar: Scalar, tensor: Any) -> Any:
        """Return a float64 scalar as a factor for a tensor of another type."""

    def weighted(self, weight: Scalar, read: Callable[[], Any], zeros: Callable[[], Any]) -> Any:
        """Return what `read` returns, times a weight; bitwise the tensor at 1, and zeros at 0 even if it has NaN."""

    def dot(self, a: Any, b: Any) -> Scalar:
        """Sum the products of two tensors' elements, as a float64 scalar."""

    def joined(self, parts: Sequence[Any]) -> Any:
        """Join tensors end to end."""

    def to_int(self, scalar: Scalar) -> Scalar:
        """Return a float64 scalar with an integral value as an integer, or a vector of them."""

    def argmax_row(self, table: Any, column: int) -> Vector:
        """Return the first row of a table with the largest entry in a column."""

    def pack(self, parts: Sequence[Any]) -> Any:
        """Join scalars and vectors end to end as a float64 tensor for `Comm`."""

    def unpack(self, tensor: Any) -> Vector:
        """Return the sum of packed tensors as a vector of scalars."""

    def reshape(self, scalars: Any, shape: tuple[int, ...]) -> Any:
        """Return the same scalars in another shape."""

    def error_if(
        self,
        failed: Scalar,
        table: Any,
        describe: Callable[[NDArray[Any]], str],
        guarded: T,
        undo: Callable[[], None] | None = None,
    ) -> T:
        """Raise ValueError(describe(table)) where `failed` holds, after a call of `undo`.

        Returns:
            `guarded`, which in a trace has no value before that is decided: its users can't run too early.
        """

    def shared(self, key: str, work: Callable[[Any], T], tensor: Any) -> T:
        """Return the result of `work`, which depends on the key and the tensor alone; traces have it once."""

    def after(self, scalar: Scalar, work: Callable[[], T]) -> T:
        """Return the result of `work`, no part of which runs before `scalar` is known."""

    def together(self, tensors: Sequence[T]) -> Sequence[T]:
        """Return these tensors; none of them can be used before all of them are there."""

    def detached(self, work: Callable[[C], T]) -> Callable[[C], T]:
        """Return the same work for another thread; what it returns goes through `attached`."""

    def attached(self, result: T) -> T:
        """Return the result of `detached` work for use in this thread."""

    def warn(
        self,
        topic: Topic,
        holds: Scalar,
        table: Any,
        describe: Callable[[NDArray[Any]], str],
        always: bool = False,
    ) -> None:
        """Log describe(table) as a warning where `holds`; only the first time for a topic, unless `always`."""


class _EagerCell:
    def __init__(self, value: bool | int) -> None:
        self._value: Scalar = value

    def get(self) -> Scalar:
        return self._value

    def set(self, value: Scalar) -> None:
        self._value = value


class EagerOps:
    """`Ops` on Python numbers and NumPy vectors.

    Args:
        to_tensor: turns a float64 array into a tensor for the adapter's `Comm`.
        to_array: the reverse.
        join: joins tensors end to end.
    """

    keeps_handles = True

    def __init__(
        self,
        to_tensor: Callable[[Any], Any] = np.asarray,
        to_array: Callable[[Any], Any] = np.asarray,
        join: Callable[[Sequence[Any]], Any] = np.concatenate,
    ) -> None:
        self._to_tensor = to_tensor
        self._to_array = to_array
        self._join = join
        self._warned: set[Topic] = set()

    def cell(self, value: bool | int) -> Cell:
        return _EagerCell(value)

    def loop(self, condition: Callable[..., Any], body: Callable[..., Any], state: tuple[Any, ...]) -> tuple[Any, ...]:
        while condition(*state):
            state = body(*state)
        return state

    def matrices(self, array: NDArray[Any]) -> Any:
        return array

    def take(self, array: Any, index: Scalar) -> Any:
        return array[index]

    def cond(self, predicate: Scalar, yes: Callable[[], T], no: Callable[[], T]) -> T:
        return yes() if predicate else no()

    def switch(self, number: Scalar, branches: Sequence[Callable[[], T]]) -> T:
        return branches[number]()

    def put(self, vector: Vector, index: int, value: Any) -> Vector:
        result = vector.copy()
        result[index] = value
        return result

    def where(self, predicate: Any, yes: Any, no: Any) -> Any:
        return np.where(predicate, yes, no)

    def choose(self, predicate: Scalar, yes: Callable[[], Any], no: Any) -> Any:
        return yes() if predicate else no

    def sum(self, table: Any) -> Any:
        return table.sum(axis=0)

    def columns(self, table: Any) -> Sequence[Vector]:
        return [table[:, number] for number in range(table.shape[1])]

    def vector(self, values: Sequence[Scalar]) -> Vector:
        return np.array(values, dtype=np.float64)

    def cast_like(self, scalar: Scalar, tensor: Any) -> Any:
        return float(scalar)

    def weighted(self, weight: Scalar, read: Callable[[], Any], zeros: Callable[[], Any]) -> Any:
        if weight == 0:
            return zeros()
        return read() if weight == 1 else read() * weight

    def dot(self, a: Any, b: Any) -> Scalar:
        return float(a @ b)

    def joined(self, parts: Sequence[Any]) -> Any:
        return parts[0] if len(parts) == 1 else self._join(parts)

    def to_int(self, scalar: Scalar) -> Scalar:
        return int(scalar) if np.ndim(scalar) == 0 else scalar.astype(np.int64)

    def argmax_row(self, table: Any, column: int) -> Vector:
        return table[table[:, column].argmax()]

    def pack(self, parts: Sequence[Any]) -> Any:
        return self._to_tensor(np.concatenate([np.atleast_1d(part) for part in parts], dtype=np.float64))

    def unpack(self, tensor: Any) -> Vector:
        return self._to_array(tensor)

    def reshape(self, scalars: Any, shape: tuple[int, ...]) -> Any:
        return scalars.reshape(shape)

    def error_if(
        self,
        failed: Scalar,
        table: Any,
        describe: Callable[[NDArray[Any]], str],
        guarded: T,
        undo: Callable[[], None] | None = None,
    ) -> T:
        if failed:
            if undo is not None:
                undo()
            raise ValueError(describe(table))
        return guarded

    def shared(self, key: str, work: Callable[[Any], T], tensor: Any) -> T:
        return work(tensor)

    def after(self, scalar: Scalar, work: Callable[[], T]) -> T:
        return work()

    def together(self, tensors: Sequence[T]) -> Sequence[T]:
        return tensors

    def detached(self, work: Callable[[C], T]) -> Callable[[C], T]:
        return work

    def attached(self, result: T) -> T:
        return result

    def warn(
        self,
        topic: Topic,
        holds: Scalar,
        table: Any,
        describe: Callable[[NDArray[Any]], str],
        always: bool = False,
    ) -> None:
        if holds and (always or topic not in self._warned):
            self._warned.add(topic)
            logger.warning("%s", describe(table))
