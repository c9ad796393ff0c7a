r"""SlowMo with ResNet-50 on ImageNet, as in the paper; with Keras. Any directory with a directory per class works.

Gradients are averaged among the GPUs of a machine, and SlowMo works between machines (--gradients node).

Run it with: hvd-slowmo run -np 32 -H HOST:8,... python examples/imagenet_keras.py --data DIRECTORY \
    --precision bfloat16 --checkpoints DIRECTORY
"""

from argparse import Namespace
from collections.abc import Callable, Iterator

import comparison
import horovod.tensorflow as hvd
import imagenet_common as common
import keras
import numpy as np
import tensorflow as tf
from epochs import Epochs
from keras_common import Rates, TensorBoard, Watch, choose_device
from progress import Progress

import hvd_slowmo.tf as slowmo

Data = tuple[common.Images, common.Images]


def batches(
    images: common.Images,
    numbers: Callable[[], Iterator[int]],
    read: Callable[[int], np.ndarray],
    args: Namespace,
    steps: int,
) -> tf.data.Dataset:
    """Return a data set of images and classes; each epoch calls `numbers` anew, and threads read the images."""
    data = tf.data.Dataset.from_generator(numbers, output_signature=tf.TensorSpec((), tf.int64))

    def load(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        pixels = tf.ensure_shape(tf.numpy_function(read, [number], tf.float32), (args.size, args.size, 3))
        return pixels, tf.gather(images.classes, number)

    data = data.map(load, num_parallel_calls=max(args.readers, 1)).batch(args.batch_size // hvd.size())
    return data.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(2)


def train(args: Namespace, method: str, seed: int, data: Data, progress: Progress) -> comparison.Run:
    """Train one method with one seed, from the newest checkpoint if there is one."""
    train_images, test_images = data
    epochs = Epochs(len(train_images.paths), args.batch_size, seed, hvd.rank(), hvd.size())
    total = args.epochs * epochs.steps
    keras.utils.set_random_seed(seed)
    if args.precision != "float32":
        keras.mixed_precision.set_global_policy(f"mixed_{args.precision}")
    body = keras.applications.ResNet50(False, weights=None, input_shape=(args.size, args.size, 3), pooling="avg")
    model = keras.Sequential([body, keras.layers.Dense(train_images.count, dtype="float32")])
    rates = Rates([common.learning_rate(step, total, args) for step in range(total)])
    # PyTorch makes the decay a part of the gradient, which momentum multiplies by 1 / (1 - 0.9). Keras does not.
    inner = keras.optimizers.SGD(rates, momentum=0.9, nesterov=True, weight_decay=args.weight_decay / (1 - 0.9))
    if args.precision == "float16":
        inner = keras.optimizers.LossScaleOptimizer(inner)
    optimizer = slowmo.SlowMo(inner, common.configure(args, method), metrics=args.logdir is not None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])

    def crop(epoch: int, number: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch, number])
        return common.random_crop(train_images.paths[number], args.size, rng)

    def statistics(epoch: int) -> Iterator[np.ndarray]:
        for chosen in epochs.batches(epoch)[: args.statistics]:
            yield np.stack([crop(epoch, int(number)) for number in chosen])

    folder = None if args.checkpoints is None else args.checkpoints / f"{method}-{seed}"
    watch = Watch(comparison.Run(method, seed), epochs.steps, progress, folder, statistics)
    checkpoints = None if folder is None else slowmo.Checkpoints(folder)
    callbacks = [slowmo.SlowMoCallback(checkpoints=checkpoints), watch]
    if args.logdir is not None and hvd.rank() == 0:
        callbacks.append(TensorBoard(args.logdir / f"{method}-{seed}"))
    own = range(hvd.rank(), len(test_images.paths), hvd.size())  # of the test
    test_steps = -(-len(own) // (args.batch_size // hvd.size()))
    model.fit(
        batches(
            train_images,
            lambda: iter(np.concatenate(epochs.batches(watch.epoch))),
            lambda number: crop(watch.epoch, int(number)),
            args,
            epochs.steps,
        ),
        validation_data=batches(
            test_images,
            lambda: iter(own),
            lambda number: common.middle_crop(test_images.paths[int(number)], args.size),
            args,
            test_steps,
        ),
        epochs=args.epochs,
        shuffle=False,  # the batches are drawn at random
        verbose=0,
        callbacks=callbacks,
    )
    return watch.run


def main() -> None:
    slowmo.init()
    args = common.parse(__doc__, hvd.rank())
    choose_device()
    data = common.load(args)
    steps = args.epochs * Epochs(len(data[0].paths), args.batch_size, 0, hvd.rank(), hvd.size()).steps
    runs = []
    with Progress(steps * args.seeds * len(args.methods), hvd.rank()) as progress:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for method in args.methods:
                progress.describe(f"{method}, seed {seed}")
                runs.append(train(args, method, seed, data, progress))
    if hvd.rank() == 0:
        common.report("keras", args, runs, hvd.size())


if __name__ == "__main__":
    main()
