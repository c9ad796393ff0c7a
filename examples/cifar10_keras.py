"""SlowMo against Local SGD with ResNet-18 on CIFAR-10, as in the paper, or on 5,000 images of MNIST; with Keras.

Run it with: hvd-slowmo run -np 4 python examples/cifar10_keras.py --dataset mnist5k
         or: hvd-slowmo run -np 4 python examples/cifar10_keras.py --data DIRECTORY --checkpoints DIRECTORY
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import comparison
import horovod.tensorflow as hvd
import images_common as common
import keras
import tensorflow as tf
from keras_common import Rates, TensorBoard, Watch, choose_device
from progress import Progress

import hvd_slowmo.tf as slowmo


def convolution(x, width: int, kernel: int, stride: int = 1, gamma: str = "ones"):
    """Add a convolution with BatchNorm."""
    options = {"use_bias": False, "kernel_initializer": keras.initializers.VarianceScaling(2, "fan_out")}
    x = keras.layers.Conv2D(width, kernel, stride, padding="same", **options)(x)
    return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, gamma_initializer=gamma)(x)


def resnet18(shape: tuple[int, ...], classes: int, width: int) -> keras.Model:
    """Return ResNet-18 (He et al., arXiv 1512.03385) for images of about 32 × 32 pixels: the stem keeps their size."""
    inputs = keras.Input(shape)
    x = keras.layers.ReLU()(convolution(inputs, width, 3))
    for stage in range(4):
        for number in range(2):
            stride, outputs = (2 if stage and not number else 1), width * 2**stage
            y = keras.layers.ReLU()(convolution(x, outputs, 3, stride))
            y = convolution(y, outputs, 3, gamma="zeros")  # the block begins as its shortcut (Goyal et al.)
            if y.shape != x.shape:
                x = convolution(x, outputs, 1, stride)
            x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    return keras.Model(inputs, keras.layers.Dense(classes)(keras.layers.GlobalAveragePooling2D()(x)))


def dataset(make: Callable[[], Iterator[Any]], shape: tuple[int, ...], batches: int) -> tf.data.Dataset:
    """Return a data set of images and classes from NumPy; each epoch calls `make` anew."""
    shapes = (tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((None,), tf.int64))
    data = tf.data.Dataset.from_generator(make, output_signature=shapes)
    return data.apply(tf.data.experimental.assert_cardinality(batches)).prefetch(2)


def train(args: Namespace, method: str, seed: int, data: common.Data, progress: Progress) -> comparison.Run:
    """Train one method with one seed, from the newest checkpoint if there is one."""
    batches = common.Batches(data, args, seed, hvd.rank(), hvd.size())
    total = args.epochs * batches.steps
    keras.utils.set_random_seed(seed)
    shape = data.train_images.shape[1:]
    model = resnet18(shape, 10, args.width)
    rates = Rates([common.learning_rate(step, total, args) for step in range(total)])
    # PyTorch makes the decay a part of the gradient, which momentum multiplies by 1 / (1 - 0.9). Keras does not.
    inner = keras.optimizers.SGD(rates, momentum=0.9, nesterov=True, weight_decay=args.weight_decay / (1 - 0.9))
    optimizer = slowmo.SlowMo(inner, comparison.METHODS[method](args), metrics=args.logdir is not None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])

    folder = None if args.checkpoints is None else args.checkpoints / f"{method}-{seed}"
    watch = Watch(
        comparison.Run(method, seed),
        batches.steps,
        progress,
        folder,
        lambda epoch: (images for images, _ in batches.epoch(epoch, args.statistics)),
    )
    checkpoints = None if folder is None else slowmo.Checkpoints(folder)
    callbacks = [slowmo.SlowMoCallback(checkpoints=checkpoints), watch]
    if args.logdir is not None and hvd.rank() == 0:
        callbacks.append(TensorBoard(args.logdir / f"{method}-{seed}"))
    model.fit(
        dataset(lambda: batches.epoch(watch.epoch), shape, batches.steps),
        validation_data=dataset(batches.test, shape, batches.test_batches),
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
    steps = args.epochs * common.Batches(data, args, 0, hvd.rank(), hvd.size()).steps
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
