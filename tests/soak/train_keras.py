"""A Keras worker of the soak."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import hvd_slowmo.tf as slowmo
from soak.diary import SHORT_EPOCH, TAU, Diary, digest, rate


def own(optimizer: slowmo.SlowMo) -> int:
    return int(np.sum(optimizer.worker.variables.read().since))


def vectors(optimizer: slowmo.SlowMo) -> list[np.ndarray]:
    kept = optimizer.worker.variables.vectors
    return [v.numpy() for name in ("anchor", "v") for v in kept[name].values()]


class Writer(keras.callbacks.Callback):
    """Writes the diary, changes the rate, averages, saves, loads, and ends the training when the soak does."""

    def __init__(self, diary: Diary, since: list, test: tuple) -> None:
        super().__init__()
        self._diary, self._since, self._test = diary, since, test

    def _everything(self) -> str:
        """Return a digest of parameters, statistics, anchor and momentum."""
        values = [v.numpy() for v in self.model.weights if v.dtype == "float32"]
        return digest((*values, *vectors(self.model.optimizer)))

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.model.optimizer.learning_rate = rate(epoch)
        self._epoch, self._where = epoch, [*self._since, epoch]

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        optimizer = self.model.optimizer
        self._diary.stand(optimizer.steps, own(optimizer))
        if batch + 1 == self._diary.count:  # not where the data end: Keras reads ahead
            self._diary.begin_join()
        self._diary.hang_if_ordered()
        if optimizer.steps % TAU == 0:
            self._diary.note("outer", step=optimizer.steps, digest=self._everything(), since=self._where)
        if batch + 1 == SHORT_EPOCH - 1 and self._epoch % 2 == 0:
            self._average()
        if self._diary.ordered("nan"):  # past the scaler, which would skip the step
            bias = self.model.trainable_variables[-1]
            bias.assign(bias * np.nan)
        time.sleep(0.005)

    def _average(self) -> None:
        images, classes = self._test
        with self.model.optimizer.averaged_parameters():
            found = keras.losses.sparse_categorical_crossentropy(classes, self.model(images), from_logits=True)
            values, loss = digest(v.numpy() for v in self.model.trainable_variables), float(np.mean(found))
            step = self.model.optimizer.steps
            self._diary.note("average", step=step, digest=values, since=self._where, loss=loss)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        optimizer = self.model.optimizer
        self._diary.note_join(step=optimizer.steps, digest=self._everything(), since=self._where)
        if epoch % 4 == 0:
            self._diary.save(partial(optimizer.save, model=self.model), epoch)
        if epoch % 10 == 9:
            self._diary.load(partial(optimizer.load, model=self.model), slowmo.mean, epoch)
        self.model.stop_training = slowmo.mean(float(self._diary.stopping)) > 0


def main() -> None:
    diary = Diary(Path(sys.argv[1]))
    diary.start_slowly()
    slowmo.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    data = load_digits()
    images, classes = (data.images / 16).astype("float32"), data.target
    decay = keras.regularizers.L2(2.5e-3)
    model = keras.Sequential(
        [
            keras.Input((8, 8)),
            keras.layers.Flatten(),
            keras.layers.Dense(512, kernel_regularizer=decay),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.Dense(512, "relu", kernel_regularizer=decay),
            keras.layers.Dense(10, kernel_regularizer=decay),
        ]
    )
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.04, momentum=0.9), dynamic_growth_steps=200)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(slowmo.SlowMo(inner, tau=TAU, beta=0.5, nonfinite="exclude"), loss)

    @slowmo.elastic.run
    def train(state: slowmo.elastic.State) -> None:
        change = state.changes[-1]
        diary.note_change(own(model.optimizer), rank=hvd.rank(), **change._asdict())
        epoch = state.epoch

        def batches():
            nonlocal epoch
            count, rng = diary.batches(epoch, hvd.rank())
            epoch += 1
            for _ in range(count):
                batch = rng.integers(0, 1500, 16)
                weight = np.inf if diary.ordered("overflow") else 1
                yield images[batch], classes[batch], np.full(16, weight, np.float32)

        signature = (tf.TensorSpec((16, 8, 8), tf.float32), tf.TensorSpec((16,), tf.int64), tf.TensorSpec((16,)))
        since = [change.step, change.workers, list(change.newcomers)]
        diary.note("common", step=0, digest=digest(vectors(model.optimizer)), since=since)
        state.model.fit(
            tf.data.Dataset.from_generator(batches, output_signature=signature),
            initial_epoch=epoch,
            epochs=10**6,
            verbose=0,
            callbacks=[slowmo.SlowMoCallback(state=state), Writer(diary, since, (images[1500:], classes[1500:]))],
        )

    train(slowmo.elastic.State(model, epoch=0))
    diary.note("end", step=model.optimizer.steps)


if __name__ == "__main__":
    main()
