"""Device, TensorBoard files, schedule and records of the Keras examples."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comparison
import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from progress import Progress

import hvd_slowmo.tf as slowmo


def choose_device() -> None:
    """Make one GPU visible to this worker; on the CPU use one thread, since workers share the machine's cores."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    devices = tf.config.list_physical_devices("GPU")
    if devices:
        tf.config.set_visible_devices(devices[hvd.local_rank() % len(devices)], "GPU")


class TensorBoard(keras.callbacks.Callback):
    """Callback that writes the optimizer's metrics to TensorBoard after each outer step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._writer = tf.summary.create_file_writer(str(folder))

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        metrics = self.model.optimizer.metrics()
        if metrics is not None and metrics.step == self.model.optimizer.steps:
            with self._writer.as_default():
                for key, value in metrics._asdict().items():
                    tf.summary.scalar(f"slowmo/{key}", value, metrics.step)


class Rates(keras.optimizers.schedules.LearningRateSchedule):
    """Schedule that has a learning rate for every step."""

    def __init__(self, rates: list[float]) -> None:
        super().__init__()
        self._rates = rates

    def __call__(self, step: Any) -> Any:
        last = len(self._rates) - 1
        return tf.gather(tf.constant(self._rates, tf.float32), tf.minimum(tf.cast(step, tf.int32), last))

    def get_config(self) -> dict[str, Any]:
        return {"rates": self._rates}


class Watch(keras.callbacks.Callback):
    """Callback that shows the progress, fills a `Run`, and tells the data which epoch it is.

    It comes behind SlowMoCallback, which joins the workers and averages Keras' metrics at the end of an epoch.

    Args:
        run: to fill.
        steps: batches per epoch.
        progress: of the whole job.
        folder: of the checkpoints, for a record of the run after each epoch; None without checkpoints.
        statistics: yields this worker's inputs for BatchNorm's statistics before an evaluation.
    """

    def __init__(
        self,
        run: comparison.Run,
        steps: int,
        progress: Progress,
        folder: Path | None,
        statistics: Callable[[int], Iterator[Any]],
    ) -> None:
        super().__init__()
        self.run = run
        self.epoch = 0
        self._steps = steps
        self._progress = progress
        self._folder = folder
        self._statistics = statistics
        self._resumed = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch = epoch
        self._resume(epoch)
        self._sent, self._began = self.model.optimizer.bytes_sent, time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._progress.update()

    def on_test_begin(self, logs: dict | None = None) -> None:  # after the epoch's batches and the join
        self._seconds = time.perf_counter() - self._began
        self._megabytes = (self.model.optimizer.bytes_sent - self._sent) / 1e6
        slowmo.recompute_statistics(self.model, self._statistics(self.epoch))

    def on_epoch_end(self, epoch: int, logs: dict) -> None:
        own = {"ms": 1000 * self._seconds / self._steps, "mb": self._megabytes}
        self.run.add(self.model.optimizer.steps, loss=logs["loss"], **slowmo.mean(own))
        self.run.score.append(100 * logs["val_accuracy"])
        self._progress.describe(f"{self.run.method}, seed {self.run.seed}, test accuracy {self.run.score[-1]:.1f} %")
        if self._folder is not None and hvd.rank() == 0:
            self._record(epoch + 1).write_text(json.dumps(asdict(self.run)), encoding="utf-8")

    def on_train_end(self, logs: dict | None = None) -> None:
        self._resume(self.model.optimizer.steps // self._steps)  # nothing was left to train

    def _resume(self, done: int) -> None:
        """Take the record of the epochs that an earlier run has done; rank 0 alone needs it, for the report."""
        if done and not self._resumed:
            self._progress.skip(done * self._steps)
            if hvd.rank() == 0:
                self.run = comparison.Run(**json.loads(self._record(done).read_text(encoding="utf-8")))
        self._resumed = True

    def _record(self, epochs: int) -> Path:
        return self._folder / f"epochs-{epochs}.json"
