"""Memory beside the model under Keras: that of all variables of the optimizer, against the formula."""

import keras
import numpy as np
import pytest

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.start.memory import bytes_beside_model
from hvd_slowmo.tf import SlowMo, SlowMoConfig
from support.memory import BLOCKING, SHAPE, TAU, WORKERS
from support.trainings.keras import GraphComm


@pytest.mark.parametrize("form", BLOCKING)
@pytest.mark.parametrize("late", [{}, {"delay": 1}, {"fragments": 4, "delay": 1}], ids=str)
@pytest.mark.slow
@pytest.mark.sample(every=5)
def test_memory_is_that_of_the_formula_within_two_percent(form, late):
    settings, vectors = BLOCKING[form]
    config = SlowMoConfig(tau=TAU, **settings, **late)

    def work(comm):
        weights = [keras.Variable(np.zeros(SHAPE, np.float32)), keras.Variable(np.zeros(SHAPE[1], np.float32))]
        optimizer = SlowMo(keras.optimizers.SGD(0.1), config, comm=GraphComm(comm))
        optimizer.broadcast(weights)
        return sum(v.numpy().nbytes for v in optimizer.variables)

    whole = 4 * (SHAPE[0] * SHAPE[1] + SHAPE[1])
    vectors += 1 if late else 0  # all that can be in flight has its place
    for found in ThreadWorld(WORKERS).run(work):
        assert found == pytest.approx(vectors * whole, rel=0.02, abs=0.02 * whole)
    sliced = whole if config.sliced_vectors else 0
    kept = bytes_beside_model(config, whole, sliced, WORKERS, whole_in_flight=True)
    assert kept == pytest.approx(vectors * whole, rel=0.02)
