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

    def refuse(self, bad, table, describe):
        def fail(found):
            raise ValueError(describe(found.numpy()))

        tf.cond(bad, lambda: tf.py_function(fail, [table], []), tf.no_op)

    def warn(self, topic, odd, table, describe, always=False):
        """Rates do not differ here."""


class TracedComm:
    """A ThreadWorld's collectives as nodes of a graph; the order is the program's."""

    def __init__(self, comm):
        self._comm = comm
        self.rank, self.size, self.ranks = comm.rank, comm.size, comm.ranks

    def start_sum(self, name, x):
        handle = tf.numpy_function(lambda value: np.int64(self._comm.start_sum(name, value)), [x], tf.int64)
        return handle, x.dtype, x.shape

    def wait(self, handle):
        number, dtype, shape = handle
        total = tf.numpy_function(lambda n: self._comm.wait(int(n)), [number], dtype)
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


def train(problem, comm, monkeypatch):
    monkeypatch.setattr("hvd_slowmo.layout.CHUNK_BYTES", 32)
    entries = (Entry("x", (DIMENSIONS,), "float64"),)
    laid = layout([Segment("slow", "float64", 8, "cpu", entries)], 1)
    store = TracedStore(problem.start() + comm.rank)
    config = SlowMoConfig(**problem.config)
    machine = Machine(config, laid, TracedOps(), store, TracedComm(comm), "slowmo", observe=True)
    state = [tf.Variable(x, dtype=tf.int64 if isinstance(x, int) else tf.float64) for x in machine.start()]
    traces = []

    @tf.function(autograph=False)
    def step(gradient, rate):
        traces.append(1)
        momentum = problem.options.get("momentum", 0.0)
        store.momentum.assign(momentum * store.momentum + gradient)
        store.vectors["model"].assign_sub(rate * store.momentum)
        after = machine.tick(Progress(*[variable.value() for variable in state]), rate[None])
        for variable, value in zip(state, after, strict=True):
            variable.assign(value)

    history = [store.vectors["model"].numpy()]
    for k in range(problem.steps):
        gradient = problem.gradient(comm.rank, k, store.vectors["model"].numpy())
        step(tf.constant(gradient), tf.constant(problem.rate(k, 0), tf.float64))
        history.append(store.vectors["model"].numpy())
    assert len(traces) == 1
    return history


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
