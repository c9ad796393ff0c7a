"""Train `support.problems.Problem` in both frameworks together, on threads and as jobs on Horovod workers.

Keras stores two of the parameters in another orientation than PyTorch. A job's worker imports only its framework.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hvd_slowmo import ParameterMap
from hvd_slowmo.wire.views import View
from support.problems import SHAPES, SIZES, Problem, chunks_of, config_of, pieces

PART3 = View.permute((2, 2, 1), (1, 2, 0))  # (2, 1, 2) on the wire
MAP = ParameterMap(
    {f"parts.{n}": f"net/holder/part{n}" for n in range(len(SHAPES))},
    orient={"net/holder/part0": "transpose", "net/holder/part3": PART3},
)
VIEWS = [View.permute((2, 3), (1, 0)), View.same((4,)), View.same(()), PART3]
TORCH = os.environ.get("POOL_TRANSPORT") == "horovod.torch"


class TorchWorker:
    """A PyTorch worker."""

    def __init__(
        self, problem: Problem, comm: Any = None, parameter_map: ParameterMap | None = MAP, split: bool = False
    ) -> None:
        from hvd_slowmo.torch import SlowMo, rank
        from support.trainings.pytorch import BASES, Model

        self.problem = problem
        self.rank = rank() if comm is None else comm.rank
        self.model = Model(problem.start() + self.rank)
        parts = list(self.model.parts)
        groups = [{"params": parts[2:]}, {"params": parts[:2]}] if split else [{"params": parts}]
        base = BASES[problem.base](groups, **{"lr": 1.0, **problem.options})
        config = config_of(problem.config)
        if comm is None:
            self.optimizer = SlowMo(base, self.model, config, parameter_map=parameter_map)
        else:
            self.optimizer = SlowMo(base, self.model, config, comm=TorchComm(comm), parameter_map=parameter_map)

    def flat(self) -> np.ndarray:
        return self.model.flat()

    def step(self, batch: int, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.problem.rate(step, 0)
        self.optimizer.zero_grad()
        self.model.set_gradient(self.problem.gradient(self.rank, batch, self.flat()))
        self.optimizer.step()

    def join(self, **options: Any) -> Any:
        return self.optimizer.join(**options)


class KerasWorker:
    """A Keras worker."""

    def __init__(
        self, problem: Problem, comm: Any = None, parameter_map: ParameterMap | None = MAP, split: bool = False
    ) -> None:
        import keras
        import tensorflow as tf

        from hvd_slowmo.tf import SlowMo
        from support.trainings.keras import GraphComm, base, horovod_rank

        class Holder(keras.layers.Layer):
            def build(self, shape: Any) -> None:
                self.parts = [
                    self.add_weight(shape=view.own, dtype="float64", name=f"part{n}") for n, view in enumerate(VIEWS)
                ]

            def call(self, x: Any) -> Any:
                return x

        keras.config.set_floatx("float64")
        self.problem = problem
        self.rank = horovod_rank() if comm is None else comm.rank
        self.model = keras.Sequential([keras.Input((1,)), Holder(name="holder")], name="net")
        for v, view, part in zip(self.model.variables, VIEWS, pieces(problem.start() + self.rank), strict=True):
            v.assign(view.to_own(part))
        config = config_of(problem.config)
        if comm is None:
            self.optimizer = SlowMo(base(problem), config, parameter_map=parameter_map)
        else:
            self.optimizer = SlowMo(base(problem), config, comm=GraphComm(comm), parameter_map=parameter_map)
        self.optimizer.broadcast(self.model)
        self._tf = tf

    def flat(self) -> np.ndarray:
        values = zip(self.model.variables, VIEWS, strict=True)
        return np.concatenate([view.to_wire(v.numpy()).reshape(-1) for v, view in values])

    def step(self, batch: int, step: int) -> None:
        self.optimizer.learning_rate = self.problem.rate(step, 0)
        gradient = pieces(self.problem.gradient(self.rank, batch, self.flat()))
        grads = [self._tf.constant(view.to_own(g)) for view, g in zip(VIEWS, gradient, strict=True)]
        self.optimizer.apply(grads, self.model.trainable_variables)

    def join(self, **options: Any) -> Any:
        return self.optimizer.join(self.model, **options)


class _Beside(NamedTuple):
    """An exchange beside the caller."""

    inner: Any


class TorchComm:
    """A ThreadWorld's collectives on PyTorch tensors, exchanged as NumPy arrays."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank, self.size, self.ranks = comm.rank, comm.size, comm.ranks
        self.node: Any = None if comm.node is None else TorchComm(comm.node)

    def start_sum(self, name: str, x: Any) -> Any:
        return self._comm.start_sum(name, x.numpy()), x

    def start_push(self, name: str, x: Any, shares: Any) -> Any:
        return self._comm.start_push(name, x.numpy(), shares), None

    def start_alltoall(self, name: str, parts: Any) -> Any:
        return self._comm.start_alltoall(name, [part.numpy() for part in parts]), None

    def start_allgather(self, name: str, x: Any, lengths: Any) -> Any:
        return self._comm.start_allgather(name, x.numpy(), lengths), None

    def open_beside(self) -> None:
        self._comm.open_beside()

    def start_beside(self, work: Any) -> Any:
        return _Beside(self._comm.start_beside(lambda comm: work(TorchComm(comm))))

    def wait(self, handle: Any) -> Any:
        import torch

        if isinstance(handle, _Beside):
            return self._comm.wait(handle.inner)
        begun, x = handle
        came = self._comm.wait(begun)
        if isinstance(came, list):
            return [torch.from_numpy(part) for part in came]
        return torch.from_numpy(np.asarray(came)) if x is None else x

    def gather(self, name: str, item: Any) -> list[Any]:
        return self._comm.gather(name, item)


def worker(problem: Problem, **options: Any) -> Any:
    """Return this Horovod worker's training, in its framework."""
    return (TorchWorker if TORCH else KerasWorker)(problem, **options)


def run(problem: Problem, chunk_bytes: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """Run all steps on a Horovod worker; return its parameters after each."""
    with chunks_of(chunk_bytes):
        mine = worker(problem, **options)
    history = [{"x": mine.flat()}]
    for step in range(problem.steps):
        mine.step(step, step)
        history.append({"x": mine.flat()})
    mine.join()  # PyTorch's last messages of OSGP would wait for Keras' next step
    return history


def epochs(problem: Problem, plan: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    """Train epochs of plan[epoch][rank] steps with a join after each; return the worker's values after each join."""
    mine = worker(problem)
    history, taken = [], 0
    for lengths in plan:
        for _ in range(lengths[mine.rank]):
            mine.step(taken, mine.optimizer.steps)
            taken += 1
        joined = mine.join()
        history.append({"x": mine.flat(), "step": mine.optimizer.steps, "behind": joined.behind})
    return history


def resumed(
    problem: Problem, path: Path, stop: int, **options: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train with a checkpoint after `stop` steps, and again from there; return the worker's values after each step."""

    def go_on(mine: Any) -> list[dict[str, Any]]:
        history = []
        for step in range(stop, problem.steps):
            mine.step(step, step)
            history.append({"x": mine.flat()})
        mine.join()
        return history

    mine = worker(problem, **options)
    for step in range(stop):
        mine.step(step, step)
    mine.optimizer.save(path)
    whole, again = go_on(mine), worker(problem, **options)
    again.optimizer.load(path)
    return whole, go_on(again)


def rolled_back(problem: Problem, path: Path) -> tuple[str, bool]:
    """Load with PyTorch's messages in flight, and after a join; return the errors, and True if all is restored."""
    mine = worker(problem)
    for step in range(4):
        mine.step(step, step)
    mine.join()
    mine.optimizer.save(path)
    there = mine.flat()
    for step in range(4, 6):
        mine.step(step, step)
    said = ""
    try:
        mine.optimizer.load(path)
    except ValueError as error:
        said = str(error)
    mine.join()
    mine.optimizer.load(path)
    return said, bool((mine.flat() == there).all())


def restarted(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Return the values after a restart, and after some more steps and a join."""
    mine = worker(problem)
    for step in range(5):
        mine.step(step, step)
    mine.optimizer.restart()
    begun = mine.flat()
    for step in range(5, 9):
        mine.step(step, step)
    mine.join()
    return begun, mine.flat()


def averaged(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values after two steps: before, within and after averaged_parameters()."""
    mine = worker(problem)
    for step in range(2):
        mine.step(step, step)
    own = mine.flat()
    with mine.optimizer.averaged_parameters():
        inside = mine.flat()
    return own, inside, mine.flat()


assert sum(SIZES) == sum(view.size for view in VIEWS)
