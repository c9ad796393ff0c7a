"""Exchanges beside the caller's thread."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar
from weakref import WeakSet

from hvd_slowmo.comm.in_turn import InTurn

T = TypeVar("T")

_LAST_WAIT_S = 2.0
_running: WeakSet[InTurn[Any]] = WeakSet()


class Beside:
    """Runs exchanges in threads.

    Args:
        take_turns: one begins when the one before is over; else as soon as it is started.
    """

    def __init__(self, take_turns: bool) -> None:
        _finish_at_exit()
        self._take_turns = take_turns
        self._last: InTurn[Any] | None = None

    def start(self, call: Callable[[], T]) -> InTurn[T]:
        """Start an exchange."""
        started = InTurn(call, self._last if self._take_turns else None)
        self._last = started
        _running.add(started)
        return started


@cache
def _finish_at_exit() -> None:
    """Let a process that ends call `_finish`, before what the transport, which is ready by now, has registered."""
    atexit.register(_finish)


def _finish() -> None:
    """Wait for exchanges under way when the process ends: a thread that it ends within a collective can crash it.

    For a short time: where another worker is lost, they do not end.
    """
    end = time.monotonic() + _LAST_WAIT_S
    for thread in list(_running):
        thread.join(max(0.0, end - time.monotonic()))
