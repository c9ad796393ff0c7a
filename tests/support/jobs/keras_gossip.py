"""Jobs for Horovod workers (see ../pool.py): gossip under `fit`, on a linear model whose gradients are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from hvd_slowmo.tf import SlowMo, SlowMoCallback
from support.problems import config_of
from support.trainings.keras import doubles

FEATURES, BATCH, RATE = 5, 4, 0.125  # the rate is exact in float32


def data(rank: int, batches: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([5, rank])
    return rng.normal(size=(batches * BATCH, FEATURES)), rng.normal(size=(batches * BATCH, 1))


def start() -> np.ndarray:
    return np.random.default_rng(3).normal(size=FEATURES)


def gradient(rank: int, batch: int, batches: int, z: np.ndarray) -> np.ndarray:
    """Return the gradient of the mean squared error over a batch of the epoch."""
    x, y = (part[(batch % batches) * BATCH :][:BATCH] for part in data(rank, batches))
    return 2 / BATCH * x.T @ (x @ z - y[:, 0])


def compiled(config: dict[str, Any], accumulated: int | None = None, **options: Any) -> keras.Model:
    layer = keras.layers.Dense(1, use_bias=False, name="layer")
    model = keras.Sequential([keras.Input((FEATURES,)), layer], name="model")  # a distinct name per optimizer
    model.set_weights([start()[:, np.newaxis]])
    sgd = keras.optimizers.SGD(RATE, gradient_accumulation_steps=accumulated)
    model.compile(SlowMo(sgd, config_of(config)), "mse", **options)
    return model


def fit(config: dict[str, Any], lengths: list[int], epochs: int, unknown: bool = False, **options: Any) -> Any:
    """Train lengths[rank] batches in each epoch; return the weights after each epoch, steps and traces.

    unknown: use a dataset of unknown length, which makes a last call without a batch.
    """
    with doubles():
        model = compiled(config, **options)
        batches = lengths[hvd.rank()]
        x, y = data(hvd.rank(), batches)
        given: dict[str, Any] = {"x": x, "y": y, "batch_size": BATCH, "shuffle": False}
        if unknown:
            signature = tuple(tf.TensorSpec((BATCH, n), tf.float64) for n in (FEATURES, 1))
            pairs = list(zip(np.split(x, batches), np.split(y, batches), strict=True))
            given = {"x": tf.data.Dataset.from_generator(lambda: iter(pairs), output_signature=signature)}
        seen = Seen()
        model.fit(**given, epochs=epochs, verbose=0, callbacks=[SlowMoCallback(), seen])
        return seen.weights, model.optimizer.steps, model.optimizer.worker.step.traces


class Seen(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.weights.append(self.model.get_weights()[0][:, 0].copy())


def saved_in_flight(config: dict[str, Any], folder: str) -> tuple[Any, Any]:
    """Save a `.keras` file with messages in flight; return the uninterrupted and the resumed run's weights by step."""
    with doubles():
        x, y = data(hvd.rank(), 1)
        model = compiled(config)
        model.optimizer.broadcast(model.variables)

        def train(model: Any) -> list[np.ndarray]:
            found = []
            for _ in range(5):
                model.train_on_batch(x, y)
                found.append(model.get_weights()[0].copy())
            return found

        train(model)
        path = Path(folder) / f"{hvd.rank()}.keras"
        model.save(path)
        whole = train(model)
        loaded = keras.models.load_model(path)
        loaded.optimizer.broadcast(loaded.variables)
        return whole, train(loaded)


def from_rank_0(config: dict[str, Any]) -> Any:
    """Load a state with messages in flight on rank 0 alone; return all values then, and after a step."""
    with doubles():
        x, y = data(hvd.rank(), 1)
        model = compiled(config)
        model.optimizer.broadcast(model.variables)
        for _ in range(4):
            model.train_on_batch(x, y)
        saved = [v.numpy() for v in (*model.trainable_variables, *model.optimizer.variables)]
        model = compiled(config)
        if hvd.rank() == 0:
            model.optimizer.build(model.trainable_variables)
            for v, value in zip((*model.trainable_variables, *model.optimizer.variables), saved, strict=True):
                v.assign(value)
        model.optimizer.broadcast(model.variables)
        assert model.optimizer.steps == 4
        first = model.get_weights()[0][:, 0].copy()
        with model.optimizer.averaged_parameters():
            mean = model.get_weights()[0][:, 0].copy()
        return first, mean
