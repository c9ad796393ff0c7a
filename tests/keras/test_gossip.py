"""Gossip bases in the Keras adapter equal the dense-matrix oracle."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.tf import SlowMo, SlowMoConfig
from hvd_slowmo.topology.graphs import ring
from support.problems import GOSSIP, distance
from support.trainings import keras as keras_training

# See test_reference.py.
tf.config.threading.set_inter_op_parallelism_threads(16)

SAME = {name: problem for name, problem in GOSSIP.items() if problem.same_everywhere}
TOLERANCE = 1e-12


def on_threads(size, problem, job=keras_training.run, **arguments):
    with keras_training.doubles(40):
        return ThreadWorld(size).run(lambda comm: job(problem, comm=comm, **arguments))


def joins_equal_the_oracle(problem, plan, histories):
    joins = [snapshot for snapshot in problem.gossip_reference(len(histories), plan) if snapshot.joined]
    for number, snapshot in enumerate(joins):
        for rank, history in enumerate(histories):
            np.testing.assert_allclose(history[number]["x"], snapshot.z[rank], rtol=0, atol=TOLERANCE)
            assert history[number]["step"] == snapshot.step


# The others run on Horovod workers, below. Each takes seconds to trace.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("osgp, star, slowmo, Adam", marks=pytest.mark.thorough), "sgp, star, slowmo, noaverage"]
)
def test_threads_equal_the_oracle(name):
    problem = SAME[name]
    assert distance(on_threads(3, problem), problem) < TOLERANCE


@pytest.mark.thorough
@pytest.mark.slow
def test_joins_with_uneven_data_equal_the_oracle_on_threads():
    plan = [(6, 3, 5), (0, 5, 1), (7, 2, 9)]
    problem = SAME["osgp, star, slowmo, noaverage"]
    joins_equal_the_oracle(problem, plan, on_threads(3, problem, keras_training.epochs, plan=plan))


def test_a_topology_is_stored_with_a_model_unless_it_is_a_function():
    for topology in (None, "star", ring(1)):
        config = SlowMoConfig.osgp(tau=3, topology=topology)
        stored = json.loads(json.dumps(SlowMo(keras.optimizers.SGD(0.1), config).get_config()))
        assert SlowMo.from_config(stored).config == config
    stored = SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig.sgp(topology=ring)).get_config()
    with pytest.raises(ValueError, match="a function ring, and only its name was"):
        SlowMo.from_config(stored)
