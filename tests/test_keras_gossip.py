"""Gossip bases in the Keras adapter equal the dense-matrix oracle."""

import keras_training
import numpy as np
import pytest
import tensorflow as tf
from problems import GOSSIP, distance

from hvd_slowmo.comm import ThreadWorld

# See test_keras_reference.py.
tf.config.threading.set_inter_op_parallelism_threads(16)

SAME = {name: problem for name, problem in GOSSIP.items() if problem.same_everywhere}
TOLERANCE = 1e-12


def on_threads(size, problem, job=keras_training.run, **arguments):
    with keras_training.doubles(40):
        return ThreadWorld(size).run(lambda comm: job(problem, comm=comm, **arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_threads_equal_the_oracle(name):
    problem = SAME[name]
    assert distance(on_threads(3, problem), problem) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["osgp, slowmo", "osgp, star, slowmo, noaverage", "sgp, star", "dpsgd, slowmo"])
def test_joins_with_uneven_data_equal_the_oracle(name):
    problem = SAME[name]
    plan = [(6, 3, 5), (4, 4, 4), (0, 5, 1), (0, 0, 0), (7, 2, 9)]
    histories = on_threads(3, problem, keras_training.epochs, plan=plan)
    joins = [snapshot for snapshot in problem.gossip_reference(3, plan) if snapshot.joined]
    for number, snapshot in enumerate(joins):
        for rank, history in enumerate(histories):
            np.testing.assert_allclose(history[number]["x"], snapshot.z[rank], rtol=0, atol=TOLERANCE)
            assert history[number]["step"] == snapshot.step


@pytest.mark.workers
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_horovod_workers_equal_the_oracle(keras_workers, size):
    for name, problem in SAME.items():
        histories = keras_workers(size).run("keras_training:run", problem=problem, chunk_bytes=40, limit=120)
        assert distance(histories, problem) < TOLERANCE, name
