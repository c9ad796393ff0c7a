"""`slowmo.measure` for PyTorch: a hook behind `step()`."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import Any

import torch
from torch.optim import Optimizer

from hvd_slowmo.advice.steps import Clock, HostClock, Parameters, StepMeasurement, exchanges, refuse_constant_exchange
from hvd_slowmo.checked_numbers import integer
from hvd_slowmo_torch.optimizer import SlowMo


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
    if isinstance(optimizer, SlowMo) and optimizer.worker.comm.size > 1:
        refuse_constant_exchange(optimizer.config)
    tensors = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    clock: Clock = _DeviceClock() if any(p.is_cuda for p in tensors) else HostClock()
    measurement = StepMeasurement(steps, clock, partial(_size_of, tensors))
    completed = count(1)

    def step_ended(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if isinstance(optimizer, SlowMo) and optimizer.worker.comm.size > 1:
            measurement.mark(optimizer.steps, partial(exchanges, optimizer.config))
        else:
            measurement.mark(next(completed), lambda step: False)

    measurement.finally_call(optimizer.register_step_post_hook(step_ended).remove)
    return measurement


def _size_of(tensors: list[torch.Tensor]) -> Parameters:
    return Parameters(sum(p.numel() for p in tensors), sum(p.numel() * max(4, p.element_size()) for p in tensors))


class _DeviceClock:
    """The time of the current CUDA stream, to which the host need not wait."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        second.synchronize()
        return float(first.elapsed_time(second)) / 1e3
