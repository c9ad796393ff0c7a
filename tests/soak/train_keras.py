"""A Keras worker of the soak."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import hvd_slowmo.tf as slowmo
from soak.diary import TAU, Diary, batches_of, digest, rate


class Writer(keras.callbacks.Callback):
    """Writes the diary, changes the rate, and ends the training when the soak does."""

    def __init__(self, diary: Diary, since: list, test: tuple) -> None:
        super().__init__()
        self._diary, self._since, self._test = diary, since, test

    def _values(self) -> str:
        return digest(v.numpy() for v in self.model.trainable_variables)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.model.optimizer.learning_rate = rate(epoch)
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._diary.hang_if_ordered()
        steps = self.model.optimizer.steps
        if steps % TAU == 0:
            self._diary.note("outer", step=steps, digest=self._values(), since=[*self._since, self._epoch])
        time.sleep(0.005)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        optimizer = self.model.optimizer
        self._diary.note("join", step=optimizer.steps, digest=self._values(), since=[*self._since, epoch])
        if epoch % 3 == 0:
            images, classes = self._test
            accuracy = float((self.model(images).numpy().argmax(1) == classes).mean())
            self._diary.note("accuracy", step=optimizer.steps, accuracy=accuracy)
        if epoch % 4 == 0:
            optimizer.save(self._diary.folder / "saved.slowmo", self.model)
            self._diary.note("save", epoch=epoch)
        self.model.stop_training = slowmo.mean(float(self._diary.stopping)) > 0


def main() -> None:
    diary = Diary(Path(sys.argv[1]))
    diary.start_slowly()
    slowmo.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    data = load_digits()
    images, classes = (data.images / 16).astype("float32"), data.target
    model = keras.Sequential(
        [
            keras.Input((8, 8)),
            keras.layers.Flatten(),
            keras.layers.Dense(64),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.Dense(10),
        ]
    )
    inner = keras.optimizers.SGD(0.04, momentum=0.9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(slowmo.SlowMo(inner, tau=TAU, beta=0.5, nonfinite="exclude"), loss)

    @slowmo.elastic.run
    def train(state: slowmo.elastic.State) -> None:
        change = state.changes[-1]
        diary.note_change(rank=hvd.rank(), **change._asdict())
        epoch = state.epoch

        def batches():
            nonlocal epoch
            count, rng = batches_of(epoch, hvd.rank())
            epoch += 1
            for _ in range(count):
                batch = rng.integers(0, 1500, 16)
                yield images[batch] * np.float32("nan" if diary.ordered("nan") else 1), classes[batch]

        signature = (tf.TensorSpec((16, 8, 8), tf.float32), tf.TensorSpec((16,), tf.int64))
        since = [change.step, change.workers, list(change.newcomers)]
        kept = model.optimizer.worker.variables.vectors
        common = digest(v.numpy() for name in ("anchor", "v") for v in kept[name].values())
        diary.note("common", step=0, digest=common, since=since)
        state.model.fit(
            tf.data.Dataset.from_generator(batches, output_signature=signature),
            initial_epoch=epoch,
            epochs=10**6,
            verbose=0,
            callbacks=[slowmo.SlowMoCallback(state=state), Writer(diary, since, (images[1500:], classes[1500:]))],
        )

    train(slowmo.elastic.State(model, epoch=0))
    diary.note("end", step=model.optimizer.steps, digest=digest(v.numpy() for v in model.trainable_variables))


if __name__ == "__main__":
    main()
