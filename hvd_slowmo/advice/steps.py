"""`slowmo.measure`: the time of a step without an exchange, from the user's own training, in either framework."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from hvd_slowmo.advice.training import BACKWARD, Training
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.schedule import CHECK_STEPS, step_plan


class Parameters(NamedTuple):
    """The size of the trained parameters."""

    number: int
    length: int  # bytes as they travel


class Clock(Protocol):
    """A source of moments."""

    def now(self) -> Any:
        """Return this moment; wait for nothing."""

    def between(self, first: Any, second: Any) -> float:
        """Return the seconds between two moments; it may wait for the second one."""


class HostClock:
    """The host's time."""

    def now(self) -> float:
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        return second - first


class _Mark(NamedTuple):
    """The end of a step."""

    moment: Any  # of the clock
    work: float  # processor seconds of this process so far
    completed: int  # steps


class _Interval(NamedTuple):
    """The time from a mark to the next one."""

    first: Any
    second: Any
    work: float
    steps: int
    exchanges: int  # steps with an exchange among them


class StepMeasurement:
    """Times the steps of an optimizer; `slowmo.measure` makes one. A context manager that stops.

    Args:
        steps: number of steps to measure, after one that starts the clock.
        clock: of the device that computes.
        parameters: finds the size of the trained parameters.

    Example:
        >>> measured = StepMeasurement(steps=3, clock=HostClock(), parameters=lambda: Parameters(4, 16))
        >>> for step in range(5):
        ...     measured.mark(step, exchanges=lambda number: False)
        >>> measured.done, measured.training().steps
        (True, 3)
    """

    def __init__(self, steps: int, clock: Clock, parameters: Callable[[], Parameters]) -> None:
        self._steps, self._clock, self._parameters = steps, clock, parameters
        self._last: _Mark | None = None
        self._intervals: list[_Interval] = []
        self._at_end: Callable[[], None] = lambda: None
        self._done = False

    def __enter__(self) -> StepMeasurement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    @property
    def done(self) -> bool:
        """True once all steps are measured, or after `stop`."""
        return self._done

    def stop(self) -> None:
        """Measure no further steps."""
        if not self._done:
            self._done = True
            self._at_end()

    def training(self) -> Training:
        """Return the measurements so far: medians over the steps.

        With parameters on a CUDA device in PyTorch this waits for the last step that was measured, and nothing before
        does.

        Raises:
            RuntimeError: no step without an exchange has been measured yet.
        """
        quiet: list[tuple[float, float]] = []
        busy: list[tuple[float, _Interval]] = []
        for each in self._intervals:
            seconds = self._clock.between(each.first, each.second)
            if each.exchanges:
                busy.append((seconds, each))
            else:
                quiet.append((seconds / each.steps, each.work / each.steps))
        if not quiet:
            raise RuntimeError(
                "no step without an exchange has been measured yet: the first step only starts the clock, and all of a "
                f"warm-up exchange gradients. Received: {self._taken} steps so far. Take more steps before."
            )
        seconds, work = (statistics.median(values) for values in zip(*quiet, strict=True))
        longer = [(elapsed - each.steps * seconds) / each.exchanges for elapsed, each in busy]
        number, length = self._parameters()
        return Training(
            seconds=seconds,
            parameters=number,
            length=length,
            work=work,
            backward=BACKWARD * seconds,
            exchange=max(0.0, statistics.median(longer)) if longer else 0.0,
            steps=self._measured,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the measurements to a JSON file for `hvd-slowmo advise --measured`, on this worker.

        Raises:
            RuntimeError: as `training`.
        """
        self.training().save(path)

    def finally_call(self, end: Callable[[], None]) -> None:
        """Let `stop` call a function, and the end of the last step too."""
        self._at_end = end

    def mark(self, completed: int, exchanges: Callable[[int], bool]) -> None:
        """Note the end of a step.

        Args:
            completed: steps completed; a smaller number than before, after a restore, only starts the clock again.
            exchanges: of a step's number, from 0: whether workers exchange something in it.
        """
        last = self._last
        if self._done or (last is not None and completed == last.completed):
            return  # no step has ended: gradients are accumulated
        now = _Mark(self._clock.now(), time.process_time(), completed)
        if last is not None and completed > last.completed:
            exchanging = sum(map(exchanges, range(last.completed, completed)))
            work, steps = now.work - last.work, completed - last.completed
            self._intervals.append(_Interval(last.moment, now.moment, work, steps, exchanging))
        self._last = now
        if self._measured >= self._steps:
            self.stop()

    def skip_to_now(self) -> None:
        """Leave out the time since the last step: it is none of the next one's."""
        if self._last is not None:
            self._last = self._last._replace(moment=self._clock.now(), work=time.process_time())

    @property
    def _measured(self) -> int:
        return sum(each.steps for each in self._intervals)

    @property
    def _taken(self) -> int:
        return self._measured + (self._last is not None)


def exchanges(config: SlowMoConfig, step: int) -> bool:
    """Return whether all workers exchange something in a step; averages within a node are a part of the computation.

    Example:
        >>> [exchanges(SlowMoConfig(tau=3), step) for step in range(4)]
        [False, False, True, False]
    """
    return step_plan(config, step)._replace(average_gradients=False).eventful


def refuse_constant_exchange(config: SlowMoConfig) -> None:
    """Refuse settings of which every step exchanges something.

    Raises:
        ValueError: they are such ones.
    """
    first = config.warmup_steps
    if all(exchanges(config, step) for step in range(first, first + max(config.tau or 0, CHECK_STEPS))):
        raise ValueError(
            "every step of this optimizer exchanges something, so that none shows the time without. Measure its "
            f"inner_optimizer, or one with blocks: SlowMoConfig(tau=12). Received: {config}"
        )
