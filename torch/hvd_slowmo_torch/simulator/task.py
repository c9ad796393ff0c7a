"""A problem for simulations, and one run of it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.errors import CommandError
from hvd_slowmo_torch.simulator.replicas import Inner, Loss
from hvd_slowmo_torch.simulator.simulation import DivergedError, Simulation


@dataclass(frozen=True)
class SimulationTask:
    """A problem that `hvd-slowmo simulate` trains with every setting of a sweep.

    Attributes:
        model: makes the model.
        inner: makes the inner optimizer over the parameters that it is given; see `Simulation`.
        loss: of a model's output for a batch and its targets.
        batches: of the number of workers m and a seed, yields (x, y) with a leading axis of the workers: (m, batch,
            ...). It must not end before the steps do.
        test: inputs and targets without an axis of the workers.
        metric: of the mean model's output for the test's inputs and its targets, the larger the better. Its name stands
            in the results.
        steps: inner steps of a run.
        config: of tau and beta, the settings.

    Example:
        >>> def batches(workers, seed):
        ...     generator = torch.Generator().manual_seed(seed)
        ...     while True:
        ...         x = torch.randn(workers, 16, 3, generator=generator)
        ...         yield x, x.sum(dim=2, keepdim=True)
        >>> x, y = next(batches(1, seed=99))
        >>> task = SimulationTask(
        ...     model=lambda: nn.Linear(3, 1),
        ...     inner=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ...     loss=nn.functional.mse_loss,
        ...     batches=batches,
        ...     test=(x[0], y[0]),
        ...     metric=lambda output, y: -(output - y).square().mean(),
        ...     steps=48,
        ... )
        >>> train(simulation_of(task, workers=4, config=SlowMoConfig(tau=4)), task).metric > -0.01
        True
    """

    model: Callable[[], nn.Module]
    inner: Inner
    loss: Loss
    batches: Callable[[int, int], Iterator[tuple[Any, Any]]]
    test: tuple[Any, Any]
    metric: Callable[[Any, Any], Any]
    steps: int = 480
    config: Callable[..., SlowMoConfig] = SlowMoConfig


class Outcome(NamedTuple):
    """The results of one run; NaN where it diverged."""

    metric: float  # of the mean model, after the last step
    loss: float  # mean over the workers and the last block
    drift: float  # of the workers from their mean, root mean square over the last block
    seconds: float


def simulation_of(task: SimulationTask, workers: int, config: SlowMoConfig, seed: int = 0) -> Simulation:
    """Return a simulation of a task.

    Raises:
        TypeError, ValueError: as `Simulation`.
    """
    return Simulation(task.model, task.inner, task.loss, workers, config, seed=seed)


def train(
    simulation: Simulation, task: SimulationTask, seed: int = 0, after_step: Callable[[int], None] = lambda step: None
) -> Outcome:
    """Train a new simulation of a task.

    Args:
        seed: of the batches, and of PyTorch's random numbers during the run.
        after_step: is told the number of steps completed.

    Raises:
        CommandError: the task's batches end before its steps.
    """
    started = time.perf_counter()
    last_block = simulation.config.tau or 1
    losses: deque[torch.Tensor] = deque(maxlen=last_block)
    drifts: deque[float] = deque(maxlen=last_block)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batches = iter(task.batches(simulation.workers, seed))
        try:
            for step in range(1, task.steps + 1):
                batch = next(batches, None)
                if batch is None:
                    raise CommandError(f"the task's batches end after {step - 1} of {task.steps} steps.")
                losses.append(simulation.step(*batch).mean())
                if step > task.steps - last_block:
                    drifts.append(simulation.drift() ** 2)
                after_step(step)
            metric = simulation.evaluate(*task.test, task.metric)
        except DivergedError:
            return Outcome(math.nan, math.nan, math.nan, time.perf_counter() - started)
    loss, drift = float(torch.stack(list(losses)).mean()), math.sqrt(sum(drifts) / len(drifts))
    return Outcome(metric, loss, drift, time.perf_counter() - started)
