"""Calls in threads of their own, one after another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class InTurn(threading.Thread, Generic[T]):
    """A call in a thread of its own, after another one: all workers start their collectives in one order.

    A daemon, so that an interrupt ends a process that waits for others. After an error nothing more is called.

    Args:
        call: to make.
        before: is over first; None: at once.

    Example:
        >>> first = InTurn(lambda: 1)
        >>> InTurn(lambda: 2, first).result(), first.result()
        (2, 1)
    """

    def __init__(self, call: Callable[[], T], before: InTurn[T] | None = None) -> None:
        super().__init__(daemon=True)
        self._call: Callable[[], T] | None = call
        self._before = before
        self._result: T | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        # Nothing of a message's size is kept by the last one.
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

    def result(self) -> T:
        """Wait, and take the result."""
        self.finish()
        result, self._result = self._result, None
        return cast(T, result)
