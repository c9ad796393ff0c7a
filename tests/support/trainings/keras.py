"""Train `support.problems.Problem` with the Keras adapter, on threads and as jobs on Horovod workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_slowmo.tf import SlowMo
from support.problems import Problem, chunks_of, config_of, pieces, with_node


def base(problem: Problem) -> keras.optimizers.Optimizer:
    """Return the inner optimizer, from PyTorch's names of its options."""
    options = dict(problem.options)
    if problem.base == "sgd":
        return keras.optimizers.SGD(0.1, **options)
    beta_1, beta_2 = options.pop("betas")
    options = {"beta_1": beta_1, "beta_2": beta_2, "epsilon": options.pop("eps"), **options}
    return {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW}[problem.base](0.1, **options)


class GraphComm:
    """A ThreadWorld's collectives as graph nodes."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._started: dict[int, Any] = {}
        self.rank, self.size, self.ranks = comm.rank, comm.size, comm.ranks
        self.node: Any = None if comm.node is None else GraphComm(comm.node)

    def start_sum(self, name: str, x: Any) -> Any:
        def start(value: np.ndarray) -> np.int64:
            number, mine = self._comm.start_sum(name, np.array(value))
            self._started[number] = mine
            return np.int64(number)

        return tf.numpy_function(start, [x], tf.int64), x.dtype, x.shape

    def start_push(self, name: str, x: Any, shares: Any) -> Any:
        def start(value: np.ndarray, given: np.ndarray) -> np.int64:
            number, mine = self._comm.start_push(name, np.array(value), given)
            self._started[number] = mine
            return np.int64(number)

        return tf.numpy_function(start, [x, shares], tf.int64), x.dtype, x.shape

    def start_alltoall(self, name: str, parts: Any) -> Any:
        lengths = [part.shape[0] for part in parts]

        def exchange(value: np.ndarray) -> np.ndarray:
            sent = np.split(np.array(value), np.cumsum(lengths)[:-1])
            return np.concatenate(self._comm.wait(self._comm.start_alltoall(name, sent)))

        return self._bytes(exchange, tf.concat(parts, 0), [lengths[self.rank]] * self.size)

    def start_allgather(self, name: str, x: Any, lengths: Any) -> Any:
        def exchange(value: np.ndarray) -> np.ndarray:
            return np.concatenate(self._comm.wait(self._comm.start_allgather(name, np.array(value), lengths)))

        return self._bytes(exchange, x, list(lengths))

    def _bytes(self, exchange: Any, x: Any, lengths: list[int]) -> Any:
        return tf.split(tf.ensure_shape(tf.numpy_function(exchange, [x], tf.uint8), [sum(lengths)]), lengths)

    def open_beside(self) -> None:
        """Do nothing: a trace has no other threads."""

    def wait(self, handle: Any) -> Any:
        if isinstance(handle, list):
            return handle
        number, dtype, shape = handle
        total = tf.numpy_function(lambda n: self._comm.wait((int(n), self._started.pop(int(n)))), [number], dtype)
        return tf.ensure_shape(total, shape)

    def gather(self, name: str, item: Any) -> list[Any]:
        return self._comm.gather(name, item)


class Worker:
    """The parameters of a problem and their optimizer, in a custom training loop."""

    def __init__(self, problem: Problem, comm: Any = None, node: Any = None) -> None:
        self.problem = problem
        self.rank = horovod_rank() if comm is None else comm.rank
        self.parts = [
            keras.Variable(part, dtype="float64", name=f"part{number}")
            for number, part in enumerate(pieces(problem.start() + self.rank))
        ]
        config = config_of(problem.config)
        if comm is None:
            self.optimizer = SlowMo(base(problem), config)
        else:
            around = None if node is None else GraphComm(node)
            self.optimizer = SlowMo(base(problem), config, comm=with_node(GraphComm(comm), around))
        self.optimizer.broadcast(self.parts)

    def flat(self) -> np.ndarray:
        return np.concatenate([part.numpy().reshape(-1) for part in self.parts])

    def held(self) -> dict[str, Any]:
        kept = self.optimizer.worker.variables.vectors
        vectors = {name: np.concatenate([v.numpy() for v in by_chunk.values()]) for name, by_chunk in kept.items()}
        return {"x": self.flat(), **vectors}

    def step(self, batch: int, step: int) -> None:
        self.optimizer.learning_rate = self.problem.rate(step, 0)
        gradient = self.problem.gradient(self.rank, batch, self.flat())
        self.optimizer.apply([tf.constant(part) for part in pieces(gradient)], self.parts)

    def advance(self, steps: range) -> list[dict[str, Any]]:
        history = []
        for step in steps:
            self.step(step, step)
            history.append(self.held())
        return history


@contextlib.contextmanager
def doubles(chunk_bytes: int | None = None) -> Iterator[None]:
    """Set rates to float64, and chunks to this many bytes."""
    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        with chunks_of(chunk_bytes):
            yield
    finally:
        keras.config.set_floatx(floatx)


def run(problem: Problem, comm: Any = None, chunk_bytes: int | None = None, node: Any = None) -> list[dict[str, Any]]:
    """Run all steps on a worker of `comm`, or of Horovod. Threads share one doubles(); call it within that."""
    with doubles(chunk_bytes) if comm is None else contextlib.nullcontext():
        worker = Worker(problem, comm, node)
        return [worker.held(), *worker.advance(range(problem.steps))]


def resumed(problem: Problem, stop: int, comm: Any = None) -> list[dict[str, Any]]:
    """Stop after `stop` steps, save the variables, and resume in new objects."""
    with doubles() if comm is None else contextlib.nullcontext():
        worker = Worker(problem, comm)
        before = worker.advance(range(stop))
        saved = [v.numpy() for v in (*worker.parts, *worker.optimizer.variables)]
        worker = Worker(problem, comm)
        for v, value in zip((*worker.parts, *worker.optimizer.variables), saved, strict=True):
            v.assign(value)
        worker.optimizer.broadcast(worker.parts)
        return [*before, *worker.advance(range(stop, problem.steps))]


def epochs(problem: Problem, plan: list[tuple[int, ...]], comm: Any = None) -> list[dict[str, Any]]:
    """Train epochs of plan[epoch][rank] steps with a join after each; return the worker's values after each join."""
    with doubles() if comm is None else contextlib.nullcontext():
        worker = Worker(problem, comm)
        history, taken = [], 0
        for lengths in plan:
            for _ in range(lengths[worker.rank]):
                worker.step(taken, worker.optimizer.steps)
                taken += 1
            joined = worker.optimizer.join(worker.parts)
            history.append({**worker.held(), "step": worker.optimizer.steps, "behind": joined.behind})
        return history


def horovod_rank() -> int:
    import horovod.tensorflow as hvd

    return int(hvd.rank())
