"""Jobs for Horovod workers (see ../pool.py): `fit` of models with a custom train_step."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig
from support.jobs.keras_fit import Log

layers = keras.layers
TAU, BATCH, NOISE = 2, 4, 3


def slowmo() -> SlowMo:
    return SlowMo(keras.optimizers.SGD(0.01), SlowMoConfig(tau=TAU))


def stack(inputs: int, *inside: Any, built: bool) -> keras.Sequential:
    return keras.Sequential([*([keras.Input((inputs,))] if built else []), *inside])


class Adversaries(keras.Model):
    """GAN in the shape of keras.io's: two optimizers, given to compile, in a custom train_step, and no call.

    One network is built, the other one is not. Whoever hides the optimizers gives them to the callback.
    """

    def __init__(self, *, hides: bool) -> None:
        super().__init__()
        self.hides = hides
        self.generator = stack(NOISE, layers.Dense(4), layers.BatchNormalization(), layers.Dense(2), built=True)
        self.discriminator = stack(2, layers.Dense(4), layers.Dropout(0.2), layers.Dense(1), built=False)
        self.noise = keras.random.SeedGenerator(7 + hvd.rank())

    def compile(self, d_optimizer: SlowMo, g_optimizer: SlowMo, loss: keras.losses.Loss) -> None:
        super().compile()
        self.criterion = loss
        self.found = lambda: (d_optimizer, g_optimizer)  # no attribute, list or dict has them
        if not self.hides:
            self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer
        self.d_loss, self.g_loss = keras.metrics.Mean("d_loss"), keras.metrics.Mean("g_loss")

    @property
    def metrics(self) -> list[keras.Metric]:
        return [self.d_loss, self.g_loss]

    def train_step(self, real: tf.Tensor) -> dict[str, tf.Tensor]:
        d_optimizer, g_optimizer = self.found()
        count = tf.shape(real)[0]
        fake = self.generator(keras.random.normal((count, NOISE), seed=self.noise))
        labels = tf.concat([tf.ones((count, 1)), tf.zeros((count, 1))], 0)
        with tf.GradientTape() as tape:
            d_loss = self.criterion(labels, self.discriminator(tf.concat([fake, real], 0), training=True))
        weights = self.discriminator.trainable_weights
        d_optimizer.apply_gradients(zip(tape.gradient(d_loss, weights), weights, strict=True))
        noise = keras.random.normal((count, NOISE), seed=self.noise)
        with tf.GradientTape() as tape:
            judged = self.discriminator(self.generator(noise, training=True))
            g_loss = self.criterion(tf.zeros((count, 1)), judged)
        weights = self.generator.trainable_weights
        g_optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights, strict=True))
        self.d_loss.update_state(d_loss)
        self.g_loss.update_state(g_loss)
        return {"d_loss": self.d_loss.result(), "g_loss": self.g_loss.result()}


class Autoencoder(keras.Model):
    """VAE in the shape of keras.io's: one optimizer, a custom train_step, and no call.

    Args:
        built: both networks are, or one of them.
    """

    def __init__(self, *, built: bool) -> None:
        super().__init__()
        self.encoder = stack(2, layers.Dense(4, "relu"), layers.Dense(2), built=True)
        self.decoder = stack(1, layers.Dense(4, "relu"), layers.Dense(2), built=built)
        self.total = keras.metrics.Mean("total_loss")

    @property
    def metrics(self) -> list[keras.Metric]:
        return [self.total]

    def train_step(self, data: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.GradientTape() as tape:
            mean, spread = tf.split(self.encoder(data), 2, axis=1)
            restored = self.decoder(mean + tf.exp(0.5 * spread) * tf.random.normal(tf.shape(mean)))
            divergence = -0.5 * tf.reduce_mean(1 + spread - tf.square(mean) - tf.exp(spread))
            loss = tf.reduce_mean(tf.square(restored - data)) + 0.1 * divergence
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        self.total.update_state(loss)
        return {"loss": self.total.result(), "last": loss}


class Losses(keras.callbacks.Callback):
    """Callback that records this worker's own metrics after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, float] = {}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.last = {key: float(value) for key, value in logs.items()}


def data(batches: int) -> np.ndarray:
    return np.random.default_rng(hvd.rank()).normal(hvd.rank(), size=(BATCH * batches, 2)).astype(np.float32)


def adversaries(batches: list[int], *, given: bool) -> dict[str, Any]:
    """Train a GAN for two epochs of batches[rank] batches, with two optimizers of the same name.

    Args:
        given: the callback is given the optimizers, which the model does not show.
    """
    keras.utils.set_random_seed(hvd.rank())
    model = Adversaries(hides=given)
    d, g = slowmo(), slowmo()
    model.compile(d, g, keras.losses.BinaryCrossentropy(from_logits=True))
    losses, callback = Losses(), SlowMoCallback(*((d, g) if given else ()))
    with Log() as lines:
        history = model.fit(
            data(batches[hvd.rank()]), batch_size=BATCH, epochs=2, verbose=0, callbacks=[losses, callback]
        )
    networks = [model.generator, model.discriminator]
    return {
        "weights": [v.numpy() for network in networks for v in network.weights if v.name != "seed_generator_state"],
        "steps": [d.steps, g.steps],
        "trained": [[v.path for v in each._trainable_variables] for each in (d, g)],
        "expected": [[v.path for v in each.trainable_weights] for each in (model.discriminator, model.generator)],
        "statistics": [
            [ref.variable.name for ref in each.worker.step.assembly.layout.refs_of("statistic")] for each in (d, g)
        ],
        "traces": [d.worker.step.traces, g.worker.step.traces],
        "history": history.history,
        "own": losses.last,
        "log": lines,
    }


def autoencoder(batches: list[int], *, built: bool) -> dict[str, Any]:
    """Train a VAE for two epochs of batches[rank] batches."""
    keras.utils.set_random_seed(hvd.rank())
    model = Autoencoder(built=built)
    model.compile(slowmo())
    losses = Losses()
    with Log() as lines:
        history = model.fit(
            data(batches[hvd.rank()]), batch_size=BATCH, epochs=2, verbose=0, callbacks=[losses, SlowMoCallback()]
        )
    return {
        "weights": [v.numpy() for v in (*model.encoder.weights, *model.decoder.weights)],
        "steps": model.optimizer.steps,
        "history": history.history,
        "own": losses.last,
        "log": lines,
    }


def both(*, given: bool) -> dict[str, Any]:
    """Train both, one after the other; with all given, nothing is left for the callback to find or to build."""
    return {"adversaries": adversaries([3, 5], given=given), "autoencoder": autoencoder([2, 5], built=given)}
