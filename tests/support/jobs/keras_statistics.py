"""A job for Horovod workers (see ../pool.py): `fit` of a model with a queue of its worker's own, and a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np

from hvd_slowmo.tf import SlowMo, SlowMoCallback

layers = keras.layers


class Queue(layers.Layer):
    """Queue of examples, which no gradient reaches, and their number."""

    def build(self, shape: Any) -> None:
        self.queue = self.add_weight(shape=(2, shape[-1]), trainable=False, name="queue")
        self.count = self.add_weight(shape=(), dtype="int32", trainable=False, name="count")

    def call(self, x: Any) -> Any:
        return x + keras.ops.mean(self.queue, axis=0)


def student(queue: str = "q") -> keras.Model:
    """Return a student with a frozen teacher behind it, and a queue of this name before it."""
    teacher = layers.Dense(1, trainable=False, use_bias=False, name="teacher")
    return keras.Sequential(
        [keras.Input((2,)), Queue(name=queue), layers.Dense(1, name="student"), teacher], name="net"
    )


class Moved(keras.callbacks.Callback):
    """Callback that moves the queue and the teacher of each worker in its own way."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.get_layer("q").queue.assign(np.full((2, 2), hvd.rank()))
        self.model.get_layer("teacher").kernel.assign([[hvd.rank()]])


def train(choice: Mapping[str, bool] | None) -> dict[str, Any]:
    """Train an epoch, by other data on each worker."""
    keras.utils.set_random_seed(hvd.rank())
    model = student()
    model.compile(SlowMo("sgd", tau=2, statistics=choice), "mse")
    x = np.random.default_rng(hvd.rank()).normal(size=(12, 2)).astype("float32")
    model.fit(x, x[:, :1], batch_size=4, verbose=0, callbacks=[SlowMoCallback(), Moved()])
    return {
        "queue": model.get_layer("q").queue.numpy(),
        "teacher": model.get_layer("teacher").kernel.numpy(),
        "student": model.get_layer("student").get_weights(),
    }
