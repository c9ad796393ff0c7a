"""Device and TensorBoard files of the Keras examples."""

from __future__ import annotations

from pathlib import Path

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


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
