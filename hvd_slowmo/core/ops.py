"""The few operations on scalars that differ between plain Python and a traced graph.

Every decision that depends on data goes through these, so that the state machine is written once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

T = TypeVar("T")

logger = logging.getLogger("hvd_slowmo")


class Ops(Protocol):
    """Scalars are Python numbers, or NumPy vectors with an entry per parameter group; traced: tensors of both."""

    holds: bool
    """Whether a collective can be under way between two calls of the state machine."""

    def loop(self, condition: Callable[..., Any], body: Callable[..., Any], state: tuple[Any, ...]) -> tuple[Any, ...]:
        """State = body(*state) while condition(*state); structures and types stay."""

    def at(self, array: Any, index: Any) -> Any:
        """A NumPy array's entry along its first axis."""

    def cond(self, predicate: Any, yes: Callable[[], T], no: Callable[[], T]) -> T:
        """The result of one of the two functions, which return scalars of the same structure and types."""

    def where(self, predicate: Any, yes: Any, no: Any) -> Any:
        """Element by element, one or the other; both are computed."""

    def total(self, table: Any) -> Any:
        """The sum over the first axis."""

    def vector(self, values: Sequence[float]) -> Any:
        """A float64 vector of scalars."""

    def like(self, scalar: Any, tensor: Any) -> Any:
        """A float64 scalar as a factor for a tensor of another type."""

    def scaled(self, tensor: Any, factor: Any) -> Any:
        """The tensor times a factor; to the bit the tensor where the factor is 1."""

    def dot(self, a: Any, b: Any) -> Any:
        """The sum of the products of two tensors' elements, as a float64 scalar."""

    def integer(self, scalar: Any) -> Any:
        """A float64 scalar with an integral value, as an integer."""

    def row_of_most(self, table: Any, column: int) -> Any:
        """The first row of a table with the largest entry in a column."""

    def pack(self, parts: Sequence[Any]) -> Any:
        """Scalars and vectors of them, one behind the other, as a float64 tensor for `Comm`."""

    def unpack(self, tensor: Any) -> Any:
        """What came back of `pack`, as a vector of scalars."""

    def reshape(self, scalars: Any, shape: tuple[int, ...]) -> Any:
        """The same scalars in another shape."""

    def refuse(self, bad: Any, table: Any, describe: Callable[[Any], str], guarded: T) -> T:
        """Raise ValueError(describe(table)) where `bad` holds; describe takes a NumPy array.

        Returns:
            `guarded`, which in a trace has no value before that is decided: what depends on it can't come too early.
        """

    def after(self, scalar: Any, work: Callable[[], T]) -> T:
        """What `work` returns, which nothing of is done before `scalar` is known."""

    def warn(self, topic: str, odd: Any, table: Any, describe: Callable[[Any], str], always: bool = False) -> None:
        """Log describe(table) as a warning where `odd` holds; only the first time for a topic, unless always."""


class EagerOps:
    """`Ops` on Python numbers and NumPy vectors. `to_tensor` and `to_array` translate for the adapter's `Comm`."""

    def __init__(self, to_tensor: Callable[[Any], Any] = np.asarray, to_array: Callable[[Any], Any] = np.asarray):
        self._to_tensor = to_tensor
        self._to_array = to_array
        self._warned: set[str] = set()

    holds = True

    def loop(self, condition: Callable[..., Any], body: Callable[..., Any], state: tuple[Any, ...]) -> tuple[Any, ...]:
        while condition(*state):
            state = body(*state)
        return state

    def at(self, array: Any, index: Any) -> Any:
        return array[index]

    def cond(self, predicate: Any, yes: Callable[[], T], no: Callable[[], T]) -> T:
        return yes() if predicate else no()

    def where(self, predicate: Any, yes: Any, no: Any) -> Any:
        return np.where(predicate, yes, no)

    def total(self, table: Any) -> Any:
        return table.sum(axis=0)

    def vector(self, values: Sequence[float]) -> Any:
        return np.array(values, dtype=np.float64)

    def like(self, scalar: Any, tensor: Any) -> Any:
        return float(scalar)

    def scaled(self, tensor: Any, factor: Any) -> Any:
        return tensor if factor == 1 else tensor * factor

    def dot(self, a: Any, b: Any) -> Any:
        return float(a @ b)

    def integer(self, scalar: Any) -> Any:
        return int(scalar)

    def row_of_most(self, table: Any, column: int) -> Any:
        return table[table[:, column].argmax()]

    def pack(self, parts: Sequence[Any]) -> Any:
        return self._to_tensor(np.concatenate([np.atleast_1d(part) for part in parts], dtype=np.float64))

    def unpack(self, tensor: Any) -> Any:
        return self._to_array(tensor)

    def reshape(self, scalars: Any, shape: tuple[int, ...]) -> Any:
        return scalars.reshape(shape)

    def refuse(self, bad: Any, table: Any, describe: Callable[[Any], str], guarded: T) -> T:
        if bad:
            raise ValueError(describe(table))
        return guarded

    def after(self, scalar: Any, work: Callable[[], T]) -> T:
        return work()

    def warn(self, topic: str, odd: Any, table: Any, describe: Callable[[Any], str], always: bool = False) -> None:
        if odd and (always or topic not in self._warned):
            self._warned.add(topic)
            logger.warning("%s", describe(table))
