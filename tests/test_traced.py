"""The state machine traced by TensorFlow does what it does eagerly: a small double, before any adapter depends on it.

Each worker is a thread with a tf.function of its own; a collective is a call from the graph into ThreadWorld. The
vectors are tf.Variables, decisions are tf.cond, and one trace serves the whole training.
"""

import numpy as np
import pytest
import tensorflow as tf
from problems import DIMENSIONS, PROBLEMS, Problem

from hvd_slowmo import SlowMoConfig
from hvd_slowmo.comm import ThreadWorld
from hvd_slowmo.layout import Entry, Segment, layout
from hvd_slowmo.machine import Machine, Progress
from hvd_slowmo.reference_join import run_epochs

# Several workers' graphs wait in this process's threads at once; with fewer threads than workers they would wait for
# each other for ever. Set before TensorFlow starts its threads.
tf.config.threading.set_inter_op_parallelism_threads(16)


class TracedOps:
    """`hvd_slowmo.ops.Ops` on tensors."""

    def cond(self, predicate, yes, no):
        if isinstance(predicate, bool):  # fixed by the settings
            return yes() if predicate else no()
        return tf.cond(predicate, yes, no)

    def where(self, predicate, yes, no):
        return tf.where(predicate, tf.cast(yes, tf.float64), tf.cast(no, tf.float64))

    def total(self, table):
        return tf.reduce_sum(table, axis=0)

    def vector(self, values):
        return tf.stack([tf.cast(value, tf.float64) for value in values]) if values else tf.zeros([0], tf.float64)

    def like(self, scalar, tensor):
        return tf.cast(scalar, tensor.dtype)

    def scaled(self, tensor, factor):
        return tensor * tf.cast(factor, tensor.dtype)

    def dot(self, a, b):
        return tf.cast(tf.tensordot(a, b, 1), tf.float64)

    def integer(self, scalar):
        return tf.cast(scalar, tf.int64)

    def row_of_most(self, table, column):
        return table[tf.argmax(table[:, column])]

    def pack(self, parts):
        return tf.concat([tf.reshape(tf.cast(part, tf.float64), [-1]) for part in parts], 0)

    def unpack(self, tensor):
        return tensor

    def reshape(self, scalars, shape):
        return tf.reshape(scalars, shape)

    def refuse(self, bad, table, describe, guarded):
        def fail(found):
            raise ValueError(describe(found.numpy()))

        with tf.control_dependencies([tf.cond(bad, lambda: tf.py_function(fail, [table], []), tf.no_op)]):
            return tf.nest.map_structure(lambda x: tf.identity(x) if tf.is_tensor(x) else x, guarded)

    def after(self, scalar, work):
        with tf.control_dependencies([scalar]):
            work()

    def warn(self, topic, odd, table, describe, always=False):
        """Rates do not differ here."""


class TracedComm:
    """A ThreadWorld's collectives as nodes of a graph; the order is the program's."""

    def __init__(self, comm):
        self._comm = comm
        self._started = {}
        self.rank, self.size, self.ranks = comm.rank, comm.size, comm.ranks

    def start_sum(self, name, x):
        def start(value):
            number, mine = self._comm.start_sum(name, np.array(value))
            self._started[number] = mine
            return np.int64(number)

        return tf.numpy_function(start, [x], tf.int64), x.dtype, x.shape

    def wait(self, handle):
        number, dtype, shape = handle
        total = tf.numpy_function(lambda n: self._comm.wait((int(n), self._started.pop(int(n)))), [number], dtype)
        return tf.ensure_shape(total, shape)


class TracedStore:
    """Vectors as variables."""

    def __init__(self, x0):
        self.vectors = {"model": tf.Variable(x0)} | {n: tf.Variable(tf.zeros_like(x0)) for n in ("anchor", "v")}
        self.momentum = tf.Variable(tf.zeros_like(x0))

    def read(self, vector, chunk):
        return self.vectors[vector][chunk.start : chunk.stop]

    def write(self, vector, chunk, value):
        self.vectors[vector][chunk.start : chunk.stop].assign(value)

    def written(self, chunk, anchor):
        return anchor

    def zeros(self, chunk):
        return tf.zeros([chunk.size], tf.float64)

    def finite(self):
        return tf.reduce_all(tf.math.is_finite(self.vectors["model"]))

    def reset_base(self):
        self.momentum.assign(tf.zeros_like(self.momentum))


class Traced:
    """A worker whose steps and joins are one trace each."""

    def __init__(self, problem, comm):
        entries = (Entry("x", (DIMENSIONS,), "float64"),)
        laid = layout([Segment("slow", "float64", 8, "cpu", entries)], 1)
        self.problem, self.rank = problem, comm.rank
        self.store = TracedStore(problem.start() + comm.rank)
        config = SlowMoConfig(**problem.config)
        self.machine = Machine(config, laid, TracedOps(), self.store, TracedComm(comm), "slowmo", observe=True)
        self.state = [
            tf.Variable(x, dtype=tf.int64 if isinstance(x, int) else tf.float64) for x in self.machine.start()
        ]
        self.traces = []
        self.step = tf.function(self._step, autograph=False)
        self.join = tf.function(self._join, autograph=False)

    @property
    def x(self):
        return self.store.vectors["model"].numpy()

    def train(self, batch, step):
        gradient = self.problem.gradient(self.rank, batch, self.x)
        self.step(tf.constant(gradient), tf.constant(self.problem.rate(step, 0), tf.float64))

    def _step(self, gradient, rate):
        self.traces.append("step")
        momentum = self.problem.options.get("momentum", 0.0)
        self.store.momentum.assign(momentum * self.store.momentum + gradient)
        self.store.vectors["model"].assign_sub(rate * self.store.momentum)
        self._keep(self.machine.tick(self._progress(), rate[None]))

    def _join(self):
        self.traces.append("join")

        def idle(_):
            after, over, _ = self.machine.idle(self._progress())
            self._keep(after)
            return (~over,)

        tf.while_loop(lambda going: going, idle, (tf.constant(True),), parallel_iterations=1)

    def _progress(self):
        return Progress(*[variable.read_value() for variable in self.state])

    def _keep(self, progress):
        for variable, value in zip(self.state, progress, strict=True):
            variable.assign(value)


def train(problem, comm, monkeypatch):
    monkeypatch.setattr("hvd_slowmo.layout.CHUNK_BYTES", 32)
    worker = Traced(problem, comm)
    history = [worker.x]
    for k in range(problem.steps):
        worker.train(k, k)
        history.append(worker.x)
    assert worker.traces == ["step"]
    return history


def uneven(problem, plan, comm, monkeypatch):
    monkeypatch.setattr("hvd_slowmo.layout.CHUNK_BYTES", 32)
    worker = Traced(problem, comm)
    history, taken = [], 0
    for lengths in plan:
        for _ in range(lengths[comm.rank]):
            worker.train(taken, int(worker.state[0].numpy()))
            taken += 1
        worker.join()
        history.append((worker.x, int(worker.state[0].numpy())))
    assert sorted(worker.traces) == ["join", "step"]
    return history


@pytest.mark.slow
@pytest.mark.parametrize("nonfinite", ["raise", "exclude"])
def test_traced_joins_equal_the_reference(nonfinite, monkeypatch):
    plan = [(6, 3), (4, 4), (0, 5), (0, 0), (7, 2)]
    config = {"tau": 4, "alpha": 0.9}
    problem = Problem({**config, "nonfinite": nonfinite}, options={"momentum": 0.9}, schedule="decay")
    histories = ThreadWorld(2).run(lambda comm: uneven(problem, plan, comm, monkeypatch))
    expected = run_epochs(
        problem.start(),
        problem.gradient,
        epochs=plan,
        workers=2,
        lr=lambda worker, step, group: problem.rate(step, group),
        base_options=problem.options,
        **config,
    )
    for number, epoch in enumerate(expected):
        for rank, history in enumerate(histories):
            np.testing.assert_allclose(history[number][0], epoch.x[rank], rtol=0, atol=1e-12)
            assert history[number][1] == epoch.step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slowmo over plain SGD", "unscaled, Nesterov", "bmuf"])
def test_traced_equals_the_reference(name, monkeypatch):
    problem = PROBLEMS[name]
    histories = ThreadWorld(2).run(lambda comm: train(problem, comm, monkeypatch))
    for step, expected in enumerate(problem.reference(2)):
        for rank, history in enumerate(histories):
            np.testing.assert_allclose(history[step], expected.x[rank], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_bad_verdict_raises_in_every_trace(monkeypatch):
    class Bad(Problem):
        def gradient(self, worker, step, x):
            return super().gradient(worker, step, x) * (np.nan if (worker, step) == (1, 4) else 1)

    problem = Bad({"tau": 3})
    for result in ThreadWorld(2).run(lambda comm: train(problem, comm, monkeypatch), return_exceptions=True):
        assert "not finite (NaN or infinity) on rank 1 after step 6" in str(result)
