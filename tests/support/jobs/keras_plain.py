"""Jobs for Horovod workers (see ../pool.py): trainings under `fit`."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np

from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig


def data(samples: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([7, rank])
    x = rng.normal(size=(samples, 4)).astype(np.float32)
    return x, x.sum(axis=1, keepdims=True)


def network() -> keras.Model:
    layers = keras.layers
    return keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.BatchNormalization(), layers.Dense(1)])


def fit(lengths: list[int], epochs: int = 3, config: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A worker with lengths[rank] batches of 4 in each epoch; what it holds at the end."""
    keras.utils.set_random_seed(hvd.rank())
    model = network()
    optimizer = SlowMo(keras.optimizers.SGD(0.01, momentum=0.5), SlowMoConfig(**(config or {"tau": 3})))
    model.compile(optimizer, "mse")
    x, y = data(4 * lengths[hvd.rank()], hvd.rank())
    history = model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=[SlowMoCallback()], **options)
    return {
        "weights": [v.numpy() for v in model.weights],
        "history": history.history,
        "steps": optimizer.steps,
        "traces": optimizer.engine.traces,
    }
