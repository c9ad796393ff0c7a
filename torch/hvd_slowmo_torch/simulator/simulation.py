"""Training of many workers in one process, by the library's own state machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from hvd_slowmo.checked_numbers import integer, number_or_nan
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.average.gradient_average import Presence
from hvd_slowmo.core.parts.outer_update import Kernels
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.slices import OwnSlices
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.step.assembly import assemble
from hvd_slowmo_torch.inner import inner_settings
from hvd_slowmo_torch.simulator.replicas import Inner, Loss, Replicas
from hvd_slowmo_torch.simulator.stack import StackCodec, StackComm, StackOps, mean_of, scaled_sum_
from hvd_slowmo_torch.simulator.store import StackGradients, StackStore
from hvd_slowmo_torch.tensors.outer_update import divide_, outer_update_
from hvd_slowmo_torch.worker import Settings

_NAME = "simulation"
# Elements of a stack's tile: few enough for a core's cache, see benchmarks/simulation.py, and a row not too short.
_CACHED = 2**17
_SHORTEST = 128


class DivergedError(ValueError):
    """Parameters of a simulation are not finite.

    Example:
        >>> issubclass(DivergedError, ValueError)
        True
    """


class Simulation:
    """Training of m workers in one process, for experiments: the results of `SlowMo` on m workers, up to rounding.

    The workers' parameters are stacked, so that one vectorized backward and one step of the inner optimizer serve all.
    Outer steps, gossip, few bits and delays are those of `hvd_slowmo.core`, on the stack. Nothing is sent.

    Args:
        model: a module, or a function that makes one; all workers start from it. It is copied.
        inner: makes the inner optimizer over the parameters it is given. The optimizer must be elementwise: norms of a
            whole parameter, as in LARS or in clipping, would mix the workers.
        loss: of the model's output for one worker's batch and its targets, a scalar.
        workers: m.
        config: the settings; None for `SlowMoConfig()`.
        seed: of PyTorch's random numbers while `model` makes a module.

    Raises:
        TypeError, ValueError: arguments that `SlowMo` refuses too, or that can't be simulated; the message says why.

    Example:
        >>> simulation = Simulation(
        ...     lambda: nn.Linear(3, 1),
        ...     inner=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        ...     loss=nn.functional.mse_loss,
        ...     workers=8,
        ...     config=SlowMoConfig(tau=4),
        ... )
        >>> for step in range(6):  # a batch of 16 examples for each of 8 workers
        ...     losses = simulation.step(torch.ones(8, 16, 3), torch.zeros(8, 16, 1))
        >>> simulation.steps, tuple(losses.shape), simulation.drift()
        (6, (8,), 0.0)
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        inner: Inner,
        loss: Loss,
        workers: int,
        config: SlowMoConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.config = SlowMoConfig() if config is None else config
        self.workers = integer("workers", workers, 1, "a positive integer")
        _refuse_settings(self.config)
        self._loss = loss
        self._replicas = Replicas(_made(model, seed), inner, self.workers, Settings(self.config, _NAME, False, None))
        layout, groups = self._replicas.describe()
        graph = None if self.config.gossip is None else Graph(self.config, self.workers)
        codec = StackCodec()
        comm = ScopedComm(StackComm(codec, self.config.bits), _NAME)
        self._store = StackStore(
            layout,
            self.workers,
            self.inner_optimizer,
            names=(*self.config.vectors, *(() if graph is None else graph.vectors)),
            own=OwnSlices(self.config, layout.layout, comm.rank, comm.size),
            average=self.config.average,
        )
        runtime = Runtime(
            self.config,
            layout.layout,
            StackOps(torch.device(segment.device) for segment in layout.layout.segments),
            self._store,
            comm,
            Kernels(outer_update_, divide_, scaled_sum_, max(_SHORTEST, _CACHED // self.workers)),
            watches=False,
            codec=codec,
            stacked=True,
        )
        self._assembly = assemble(runtime, layout, groups, graph)

        def undone(progress: Progress) -> None:
            self._progress = progress

        self._assembly.machine.undone = undone
        self._gradients = StackGradients(layout, self.workers)
        inner_settings.record(self.inner_optimizer)
        with torch.no_grad():
            self._progress = self._assembly.machine.start()

    @property
    def inner_optimizer(self) -> Optimizer:
        """The inner optimizer over the stacked parameters, for a learning rate scheduler of PyTorch."""
        return self._replicas.inner

    @property
    def steps(self) -> int:
        """Number of inner steps that each worker has completed."""
        return int(self._progress.step)

    def step(self, x: Any, y: Any) -> torch.Tensor:
        """Take one inner step on every worker, and the exchange that is due after it.

        Args:
            x: the workers' batches, with a leading axis of the workers: (m, batch, ...).
            y: their targets.

        Returns:
            Each worker's loss before the step, (m,).

        Raises:
            DivergedError: a ValueError: parameters are not finite on some workers when they meet.
            ValueError: the loss is no scalar, or depends on no parameter.
        """
        machine, inner = self._assembly.machine, self.inner_optimizer
        plan = machine.plan(self._progress)
        losses = self._replicas.backward(self._loss, x, y)
        rates = self._rates()
        with torch.no_grad():
            if plan.all_gradients:
                average = self._assembly.averages.of_all
                average.send_rest(self._gradients, Presence(training=1, leaving=0, rates=rates))
                average.finish(self._gradients)
            with inner_settings.watched(inner, resets=self.config.inner_state == "reset"):
                inner.step()
            with self._naming_workers(self.steps + 1):
                self._progress = machine.after_inner_step(self._progress, rates)
        return losses

    def model(self, worker: int) -> nn.Module:
        """Return a copy of one worker's model, in evaluation mode."""
        return self._replicas.model(worker)

    def mean_model(self) -> nn.Module:
        """Return a new model with the workers' mean, BatchNorm's statistics included, in evaluation mode.

        As `SlowMo.averaged_parameters()`, which counts messages of gossip that are under way, and applies late
        exchanges before their time.

        Raises:
            DivergedError: a ValueError: parameters are not finite on some workers.
        """
        machine, stacked = self._assembly.machine, self._replicas.stacked
        with torch.no_grad(), self._naming_workers(self.steps):
            self._progress = machine.complete(self._progress)
            before = {name: stack.clone() for name, stack in stacked.items()}
            try:
                machine.average(self._progress)
                return self._replicas.model(0)
            finally:
                for name, stack in stacked.items():
                    stack.copy_(before[name])

    def evaluate(self, x: Any, y: Any, metric: Callable[[Any, Any], Any]) -> float:
        """Return a metric of the mean model's output for inputs and targets, without an axis of the workers."""
        with torch.no_grad():
            return float(metric(self.mean_model()(x), y))

    def drift(self) -> float:
        """Return the root mean square distance of the workers' parameters from their mean, by the norm of the mean.

        0 right after an outer step.
        """
        away = size = 0.0
        for chunk in self._assembly.layout.layout.parameter_chunks:
            stack = self._store.read("model", chunk)
            mean = mean_of(stack)
            size += float(mean.square().sum(dtype=torch.float64))
            away += float((stack - mean).square().sum(dtype=torch.float64)) / self.workers
        return math.sqrt(away / size) if size else 0.0

    @contextmanager
    def _naming_workers(self, step: int) -> Iterator[None]:
        """Name the workers that are not finite in an error of the core, which takes a stack for one worker."""
        try:
            yield
        except ValueError as error:
            broken = self._store.broken()
            if not broken:
                raise
            raise DivergedError(
                f"parameters or BatchNorm statistics are not finite (NaN or infinity) on {len(broken)} of "
                f"{self.workers} workers ({', '.join(map(str, broken[:8]))}{', ..' if broken[8:] else ''}) after "
                f"step {step}. A lower learning rate may help."
            ) from error

    def _rates(self) -> NDArray[np.float64]:
        groups = self.inner_optimizer.param_groups
        return np.array([number_or_nan(groups[own]["lr"]) for own in self._assembly.groups.own])


def _made(model: nn.Module | Callable[[], nn.Module], seed: int) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model()


def _refuse_settings(config: SlowMoConfig) -> None:
    """Refuse settings that can't be simulated."""
    reasons = {
        "gradients='node'": (config.gradients == "node", "a node is one worker with the batches of its workers in one"),
        "shard=True": (config.shard, "it moves the outer state between workers, and changes no result"),
        "slow_state='host'": (config.slow_state == "host", "it moves the outer state, and changes no result"),
        "nonfinite='exclude'": (config.nonfinite == "exclude", "the workers are averaged with one weight for all"),
    }
    for setting, (chosen, reason) in reasons.items():
        if chosen:
            raise ValueError(f"{setting} can't be simulated: {reason}. Leave the setting out.")
