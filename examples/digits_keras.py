"""SlowMo against Local SGD and AR-SGD on scikit-learn's handwritten digits, with Keras.

The same job as digits_torch.py, with `model.fit`. Here the workers join at the end of every epoch; digits_torch.py only
averages the parameters for the evaluation.

Run it with: horovodrun -np 4 python examples/digits_keras.py
"""

import time

import comparison
import digits_common as common
import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from keras_common import TensorBoard, choose_device
from progress import Progress

import hvd_slowmo.tf as slowmo


def network() -> keras.Model:
    """Return a small convolutional network for images of shape (n, 8, 8)."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8)),
            layers.Reshape((8, 8, 1)),
            layers.Conv2D(8, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


class Watch(keras.callbacks.Callback):
    """Callback that fills a `Run`, after SlowMoCallback has joined the workers and averaged Keras' metrics."""

    def __init__(self, run: comparison.Run, progress: Progress) -> None:
        super().__init__()
        self._run = run
        self._progress = progress
        self._timed = self._seconds = 0.0
        self._sent = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._sent = self.model.optimizer.bytes_sent

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._begin = time.perf_counter()

    def on_test_begin(self, logs: dict | None = None) -> None:  # after the epoch's batches and the join
        before = self._run.steps[-1] if self._run.steps else 0
        self._run.steps.append(self.model.optimizer.steps)
        if before or self.params["epochs"] == 1:  # TensorFlow traces in the first epoch
            self._seconds += time.perf_counter() - self._begin
            self._timed += self._run.steps[-1] - before
        self._progress.update(self._run.steps[-1] - before)

    def on_epoch_end(self, epoch: int, logs: dict) -> None:
        self._run.loss.append(logs["loss"])
        self._run.score.append(100 * logs["val_accuracy"])

    def on_train_end(self, logs: dict | None = None) -> None:
        milliseconds = tf.constant(1000 * self._seconds / self._timed)
        self._run.ms_per_step = hvd.allreduce(milliseconds, name="milliseconds").numpy().item()
        self._run.mb_sent = (self.model.optimizer.bytes_sent - self._sent) / 1e6


class Measure(keras.callbacks.Callback):
    """Callback that collects the metrics of every outer step in a `Run`."""

    def __init__(self, run: comparison.Run) -> None:
        super().__init__()
        self._run = run

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        seen = self.model.optimizer.metrics()
        if seen is not None and seen.step == self.model.optimizer.steps:
            self._run.metrics.append(seen)


def compiled(args, method: str) -> keras.Model:
    """Return the network, compiled with SlowMo."""
    model = network()
    inner = keras.optimizers.SGD(args.lr, momentum=0.9, nesterov=True)
    optimizer = slowmo.SlowMo(inner, comparison.METHODS[method](args), metrics=args.metrics or args.logdir is not None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    optimizer.build(model.trainable_variables)
    return model


def train(args, model: keras.Model, method: str, seed: int, data: common.Data, progress: Progress) -> comparison.Run:
    """Train one method from scratch. All runs of a method reuse the model's traced functions."""
    run = comparison.Run(method, seed)
    keras.utils.set_random_seed(seed)
    model.set_weights(network().get_weights())
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))

    mine = common.shard(data.train_classes, args.shards, hvd.rank(), hvd.size(), seed)
    batches = tf.data.Dataset.from_tensor_slices((data.train_images[mine], data.train_classes[mine]))
    batches = batches.shuffle(len(mine), seed=seed * hvd.size() + hvd.rank())
    batches = batches.batch(args.batch_size, drop_remainder=True)

    late = args.epochs - args.epochs // 5
    callbacks = [
        slowmo.SlowMoCallback(),
        keras.callbacks.LearningRateScheduler(lambda epoch, _: args.lr * (0.1 if epoch >= late else 1)),
        Watch(run, progress),
    ]
    if args.metrics:
        callbacks.append(Measure(run))
    if args.logdir is not None and hvd.rank() == 0:
        callbacks.append(TensorBoard(args.logdir / f"{method}-{seed}"))
    # Validation follows the epoch's join: all workers hold the mean, and each evaluates a part of the test data.
    test = tuple(part[hvd.rank() :: hvd.size()] for part in (data.test_images, data.test_classes))
    options = {"validation_data": test, "validation_batch_size": len(test[0]), "callbacks": callbacks}
    model.fit(batches, epochs=args.epochs, shuffle=False, verbose=0, **options)  # the data set shuffles
    return run


def main() -> None:
    hvd.init()
    args = common.parse(__doc__, hvd.rank())
    choose_device()
    data = common.load()

    models = {method: compiled(args, method) for method in args.methods}
    runs = []
    steps = args.epochs * common.steps_per_epoch(data, args.batch_size, hvd.size())
    total = steps * args.seeds * len(args.methods)
    with Progress(total, hvd.rank()) as progress:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for method in args.methods:
                progress.describe(f"{method}, seed {seed}")
                runs.append(train(args, models[method], method, seed, data, progress))
    if hvd.rank() == 0:
        common.report("digits_keras", args, runs, hvd.size())


if __name__ == "__main__":
    main()
