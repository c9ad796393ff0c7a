"""Small Keras models and training loops for the contract's tests, in this process and on Horovod workers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_slowmo.tf import SlowMo, SlowMoConfig

layers = keras.layers
BARE = SlowMoConfig.local_sgd(1)  # on one worker, the inner optimizer alone


def fill(model: keras.Model, seed: int = 0) -> keras.Model:
    """Fill the model from a separate random generator, since threads share Keras' global one."""
    rng = np.random.default_rng(seed)
    for v in model.trainable_variables:
        v.assign(rng.normal(size=v.shape))
    return model


def net(seed: int = 0, **options: Any) -> keras.Model:
    first = layers.Dense(3, activation="tanh", name="first", **options)
    return fill(keras.Sequential([keras.Input((4,)), first, layers.Dense(2, name="second", **options)]), seed)


def with_statistics() -> keras.Model:
    inside = [layers.Dense(3), layers.BatchNormalization(momentum=0.5), layers.Dense(2)]
    return fill(keras.Sequential([keras.Input((4,)), *inside]))


def words() -> keras.Model:
    """Return a model whose first gradient is tf.IndexedSlices."""
    inside = [layers.Embedding(10, 4), layers.GlobalAveragePooling1D(), layers.Dense(2)]
    return fill(keras.Sequential([keras.Input((6,), dtype="int32"), *inside]))


def batch(rank: int, k: int, samples: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([rank, k])
    return rng.normal(size=(samples, 4)).astype("float32"), rng.normal(size=(samples, 2)).astype("float32")


def sentences(rank: int, k: int, samples: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([rank, k])
    return rng.integers(10, size=(samples, 6)), rng.normal(size=(samples, 2)).astype("float32")


def held(model: keras.Model) -> list[np.ndarray]:
    return [v.numpy() for v in model.weights]


def memory(variable: tf.Variable) -> int:
    """Return where the memory lies that a reader of a variable gets."""
    return int(variable.value()._numpy().__array_interface__["data"][0])


def step_of(model: keras.Model, optimizer: Any) -> Any:
    """Return one step of a custom training loop; run it eagerly or as a tf.function."""

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(tf.reduce_mean(tf.square(tf.cast(model(x, training=True), tf.float32) - y)))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )

    return step


def loop(
    model: keras.Model, optimizer: Any, steps: range, rank: int = 0, traced: bool = True, data: Any = batch
) -> list[list[np.ndarray]]:
    """Train in a loop; return the model's values after each step."""
    step = step_of(model, optimizer)
    if traced:
        step = tf.function(step, autograph=False)
    history = []
    for k in steps:
        step(*map(tf.constant, data(rank, k)))
        history.append(held(model))
    return history


def fit(
    model: keras.Model,
    optimizer: Any,
    steps: range,
    epochs: int = 1,
    rank: int = 0,
    data: Any = batch,
    compiled: dict[str, Any] | None = None,
    **options: Any,
) -> keras.callbacks.History:
    """Train on the same batches with `fit`."""
    x, y = (np.concatenate(parts) for parts in zip(*(data(rank, k) for k in steps), strict=True))
    model.compile(optimizer, "mse", **(compiled or {}))
    return model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **options)


def bare(inner: Any, **settings: Any) -> SlowMo:
    return SlowMo(inner, BARE, **settings)


def same(a: Any, b: Any) -> bool:
    """Return True if the values, nested in lists, are bitwise identical."""
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b)
