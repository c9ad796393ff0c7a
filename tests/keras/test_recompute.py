"""BatchNorm's statistics under Keras, recomputed over the batches of all workers."""

import keras
import numpy as np
import pytest

import hvd_slowmo.tf as slowmo
from hvd_slowmo.comm.threads import ThreadWorld


@pytest.mark.parametrize("targets", [False, True])
def test_statistics_are_the_mean_over_all_batches(targets):
    def work(comm):
        model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)])
        layer = model.layers[0]
        layer.moving_mean.assign([99.0])
        own = [np.array([[1.0], [3.0]]) + 4 * comm.rank + k for k in range([3, 1][comm.rank])]
        slowmo.recompute_statistics(model, [(x, x) for x in own] if targets else own, comm=comm)
        return float(layer.moving_mean[0]), float(layer.moving_variance[0]), layer.momentum

    assert ThreadWorld(2).run(work) == [(3.75, 1.0, 0.99)] * 2


def test_a_pass_that_fails_on_one_worker_is_one_error_on_all():
    def failing(rank):
        yield np.array([[1.0], [3.0]])
        if rank == 1:
            raise TypeError("no batch")

    def work(comm):
        model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
        layer = model.layers[0]
        layer.moving_mean.assign([99.0])
        with pytest.raises(TypeError, match="rank 1: no batch"):
            slowmo.recompute_statistics(model, failing(comm.rank), comm=comm)
        return float(layer.moving_mean[0]), float(layer.moving_variance[0]), layer.momentum

    assert ThreadWorld(2).run(work) == [(99.0, 1.0, 0.99)] * 2
