"""The Keras adapter equals the reference, and so the PyTorch adapter: one list of problems, on threads and workers."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld
from support.problems import PROBLEMS, distance
from support.sample import some
from support.trainings import keras as keras_training

# Several workers' graphs wait in this process's threads at once; with fewer threads than workers they would wait for
# each other for ever. Set before TensorFlow starts its threads.
tf.config.threading.set_inter_op_parallelism_threads(16)

SAME = {name: problem for name, problem in PROBLEMS.items() if problem.same_everywhere}


def train(size, problem, chunk_bytes=None, job=keras_training.run, **arguments):
    with keras_training.doubles(chunk_bytes):
        return ThreadWorld(size).run(lambda comm: job(problem, comm=comm, **arguments))


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", SAME)
def test_threads_equal_the_reference(name):
    problem = SAME[name]
    histories = train(3, problem, chunk_bytes=40)
    assert distance(histories, problem) < 1e-12
    for step in (s.step for s in problem.reference(3) if s.outer):
        assert equal(histories[1][step], histories[0][step])
        assert equal(histories[2][step], histories[0][step])


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_horovod_workers_equal_the_reference(keras_workers, size):
    for name, problem in some(SAME):
        histories = keras_workers(size).run("support.trainings.keras:run", problem=problem, chunk_bytes=40)
        assert distance(histories, problem) < 1e-12, name
        for step in (s.step for s in problem.reference(size) if s.outer):
            for history in histories[1:]:
                assert equal(history[step], histories[0][step]), (name, step)
