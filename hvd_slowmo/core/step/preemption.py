"""Preemption: a signal to one worker ends all of them, after the same step and a save.

A handler sets a flag and nothing else. The flag rides in the next exchange's table, so that every worker knows of it
after the same step; see `hvd_slowmo.core.parts.roll_call`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hvd_slowmo.core.parts.roll_call import RollCall

logger = logging.getLogger("hvd_slowmo")

PREEMPTED = 75
"""Exit status of all workers after a preemption: EX_TEMPFAIL of sysexits.h, "try again"."""

ONE_SIGNAL_S = 1.0
"""Signals within this time are one: a launcher passes on what the terminal or the scheduler has sent already."""


class _Preemption:
    """This process' handlers."""

    def __init__(self, save: Any) -> None:
        self.save = save
        self.received = 0.0  # time of the first signal
        self.saved = False
        self._earlier: dict[int, Any] = {}
        self._wakeup: int | None = None  # the end of a pipe into which the system writes each signal's number

    def install(self, signals: Sequence[int]) -> None:
        for number in signals:
            self._earlier[number] = signal.signal(number, self._handle)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if earlier != -1:  # an event loop's; the handlers alone must do then
            signal.set_wakeup_fd(earlier)
            os.close(writer)
            os.close(reader)
            return
        self._wakeup = writer
        threading.Thread(target=self._watch, args=(reader,), name="hvd_slowmo.preemption", daemon=True).start()

    def remove(self) -> None:
        for number, earlier in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)  # which ends the thread

    def _handle(self, number: int, frame: Any) -> None:
        first = not self.received
        self.received = self._second(number, self.received)
        earlier = self._earlier[number]
        if first and callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)

    def _watch(self, reader: int) -> None:
        """Look for a second signal in a thread: no handler runs while the main thread waits in a collective."""
        received = 0.0
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number in self._earlier:
                    received = self._second(number, received)
        os.close(reader)

    def _second(self, number: int, received: float) -> float:
        """End the process if this is a second signal; return the time of the first one."""
        now = time.monotonic()
        if received and now - received > ONE_SIGNAL_S:
            os._exit(PREEMPTED if self.saved else 128 + number)
        return received or now


_current: _Preemption | None = None


def install(save: Any, signals: Sequence[int]) -> None:
    """Set handlers in place of those of an earlier call.

    Args:
        save: see `saves_to`; None: the signals do again what they did before.

    Raises:
        RuntimeError: not in the main thread.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("on_preemption() sets signal handlers, which Python allows in the main thread only.")
    if _current is not None:
        _current.remove()
    _current = None if save is None else _Preemption(save)
    if _current is not None:
        _current.install(signals)


def _forget_in_child() -> None:
    """Let signals to a forked process (a data loader's) end it, and not count as this one's."""
    global _current
    if _current is not None:
        _current.remove()
        _current = None


os.register_at_fork(after_in_child=_forget_in_child)


def tell(roll: RollCall) -> None:
    """Let the next exchange tell the others if this worker has received a signal."""
    if _current is not None and _current.received:
        roll.wish.set(True)


def due(roll: RollCall, step: int) -> bool:
    """Return whether all workers save and end after this step: one has been asked to, and all are together.

    Raises:
        RuntimeError: this worker does not know how to.
    """
    if not roll.asked or not roll.together(step):
        return False
    if _current is None:
        raise RuntimeError(
            "another rank was asked to end, and saves now; here on_preemption() was not called. Call it on every rank."
        )
    return True


def saves_to() -> Any:
    """Return what `install` was given, a path or what saves by itself; None before it was called."""
    return None if _current is None else _current.save


def end(step: int, where: object) -> None:
    """End this worker: everything is saved.

    Raises:
        SystemExit: with status `PREEMPTED`.
    """
    assert _current is not None, "due() has looked"
    _current.saved = True
    logger.warning("ended by a signal after step %d; the state is in %s", step, where)
    raise SystemExit(PREEMPTED)


def save_and_end(roll: RollCall, step: int, save: Callable[[Any], None]) -> None:
    """Save to the path of `on_preemption` and end, where that is due and the save is not one of `Checkpoints`.

    Args:
        save: writes a checkpoint to a path, a collective.

    Raises:
        SystemExit: all is saved.
    """
    if not roll.asked:  # the common step: this costs less than a microsecond
        return
    path = saves_to()
    itself = path is not None and not isinstance(path, (str, os.PathLike))
    if not itself and due(roll, step):
        save(path)
        end(step, path)
