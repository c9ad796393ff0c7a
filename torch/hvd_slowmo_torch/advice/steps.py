"""`slowmo.measure`: the time of a step without an exchange, from the user's own training."""

from __future__ import annotations

import os
import statistics
import time
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from hvd_slowmo.advice.training import BACKWARD, Training
from hvd_slowmo.checked_numbers import integer
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.schedule import CHECK_STEPS, step_plan
from hvd_slowmo_torch.optimizer import SlowMo


class _Mark(NamedTuple):
    """The end of a step."""

    moment: Any  # of the clock
    work: float  # processor seconds of this process so far
    exchanged: bool  # the step that has ended had an exchange


class StepMeasurement:
    """Times the steps of an optimizer; `measure` makes one.

    Example:
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(3, 1).parameters(), lr=0.1)
        >>> with measure(optimizer) as measured:
        ...     for _ in range(3):
        ...         optimizer.step()
        >>> measured.done, measured.training().steps
        (True, 2)
    """

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self._optimizer, self._steps = optimizer, steps
        groups = optimizer.param_groups
        self._tensors = [p for group in groups for p in group["params"] if p.requires_grad]
        on_device = any(p.is_cuda for p in self._tensors)
        self._clock: _HostClock | _DeviceClock = _DeviceClock() if on_device else _HostClock()
        self._marks: list[_Mark] = []
        self._hook: Any = optimizer.register_step_post_hook(self._step_ended)

    def __enter__(self) -> StepMeasurement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    @property
    def done(self) -> bool:
        """True once all steps are measured, or after `stop`."""
        return self._hook is None

    def stop(self) -> None:
        """Measure no further steps."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def training(self) -> Training:
        """Return the measurements so far: medians over the steps.

        With parameters on a CUDA device this waits for the last step that was measured, and nothing before does.

        Raises:
            RuntimeError: no step without an exchange has been measured yet.
        """
        quiet: list[tuple[float, float]] = []
        busy: list[float] = []
        for before, after in zip(self._marks, self._marks[1:], strict=False):
            seconds = self._clock.between(before.moment, after.moment)
            if after.exchanged:
                busy.append(seconds)
            else:
                quiet.append((seconds, after.work - before.work))
        if not quiet:
            raise RuntimeError(
                "no step without an exchange has been measured yet: the first step only starts the clock, and all of a "
                f"warm-up exchange gradients. Received: {len(self._marks)} steps so far. Take more steps before."
            )
        seconds, work = (statistics.median(values) for values in zip(*quiet, strict=True))
        return Training(
            seconds=seconds,
            parameters=sum(p.numel() for p in self._tensors),
            length=sum(p.numel() * max(4, p.element_size()) for p in self._tensors),
            work=work,
            backward=BACKWARD * seconds,
            exchange=max(0.0, statistics.median(busy) - seconds) if busy else 0.0,
            steps=len(quiet) + len(busy),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the measurements to a JSON file for `hvd-slowmo advise --measured`, on this worker.

        Raises:
            RuntimeError: as `training`.
        """
        self.training().save(path)

    def _step_ended(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._marks.append(_Mark(self._clock.now(), time.process_time(), _has_exchanged(optimizer)))
        if len(self._marks) > self._steps:
            self.stop()


def measure(optimizer: Optimizer, steps: int = 50) -> StepMeasurement:
    """Time the coming steps of an optimizer, from the end of one to the end of the next, loading of data included.

    No communication and no wait for a device: a hook behind `step()` notes the time, on a CUDA device by an event of
    its stream. Steps with an exchange count apart, so that the step time is that of the computation alone.

    Args:
        optimizer: SlowMo, or any torch.optim.Optimizer, which exchanges nothing.
        steps: number of steps to measure, after one that starts the clock.

    Returns:
        An object with `training()`, `save(path)`, `stop()` and `done`; a context manager that stops.

    Raises:
        TypeError: `optimizer` or `steps` has another type.
        ValueError: `steps` is no positive integer, or every step of this optimizer exchanges something.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> measured = measure(optimizer, steps=5)
        >>> while not measured.done:
        ...     model(torch.ones(2, 3)).sum().backward()
        ...     optimizer.step()
        >>> measured.training().parameters, measured.training().steps
        (4, 5)
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer. Received: {type(optimizer).__name__}")
    steps = integer("steps", steps, 1, "a positive integer")
    if isinstance(optimizer, SlowMo) and optimizer.worker.comm.size > 1 and _always_exchanges(optimizer.config):
        raise ValueError(
            "every step of this optimizer exchanges something, so that none shows the time without. Measure its "
            f"inner_optimizer, or one with blocks: SlowMoConfig(tau=12). Received: {optimizer.config}"
        )
    return StepMeasurement(optimizer, steps)


def _always_exchanges(config: SlowMoConfig) -> bool:
    first = config.warmup_steps
    return all(_exchanges(config, step) for step in range(first, first + max(config.tau or 0, CHECK_STEPS)))


def _exchanges(config: SlowMoConfig, step: int) -> bool:
    """Return whether all workers exchange something in a step; averages within a node are a part of the computation."""
    return step_plan(config, step)._replace(average_gradients=False).eventful


def _has_exchanged(optimizer: Optimizer) -> bool:
    if not isinstance(optimizer, SlowMo) or optimizer.worker.comm.size == 1:
        return False
    return _exchanges(optimizer.config, optimizer.steps - 1)


class _HostClock:
    """The host's time."""

    def now(self) -> float:
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        """Return the seconds between two moments."""
        return second - first


class _DeviceClock:
    """The time of the current CUDA stream, to which the host need not wait."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Return the seconds between two moments; it waits for the second one."""
        second.synchronize()
        return float(first.elapsed_time(second)) / 1e3
