"""The images task: 5,000 images of MNIST and a small convolutional network with BatchNorm, on simulated workers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

import digits_common
import numpy as np
import torch
from images_common import load_mnist5k
from torch import nn
from torch.nn import functional as F

import hvd_slowmo.torch as slowmo

BATCH = 16
TRAINING = 3500  # of the 4,000 that are not the test's; the other 500 choose the learning rate

Shards = Literal["alike", "apart"]


class Split(NamedTuple):
    """Images of shape (n, 1, 28, 28) from 0 to 1, and their classes."""

    images: torch.Tensor
    classes: torch.Tensor


@cache
def splits() -> dict[str, Split]:
    """Return the training, validation and test images."""
    data = load_mnist5k()

    def split(images: np.ndarray, classes: np.ndarray) -> Split:
        return Split(torch.from_numpy(images[..., 0] / np.float32(255))[:, None], torch.from_numpy(classes))

    return {
        "training": split(data.train_images[:TRAINING], data.train_classes[:TRAINING]),
        "validation": split(data.train_images[TRAINING:], data.train_classes[TRAINING:]),
        "test": split(data.test_images, data.test_classes),
    }


def network() -> nn.Module:
    """Return the network, with 9,098 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 10),
    )


def batches(workers: int, seed: int, shards: Shards) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a batch for each worker from its own shard, drawn with replacement."""
    images, classes = splits()["training"]
    blurred = classes.numpy().astype(float)
    if shards == "apart":  # nearly sorted by class
        blurred = blurred + np.random.default_rng(seed).normal(scale=0.5, size=len(blurred))
    kind = "random" if shards == "alike" else "sorted"
    own = [digits_common.shard(blurred, kind, rank, workers, seed) for rank in range(workers)]
    length = min(map(len, own))
    table = torch.stack([torch.from_numpy(each[:length]) for each in own])
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = table.gather(1, torch.randint(length, (workers, BATCH), generator=generator))
        yield images[drawn], classes[drawn]


class Outcome(NamedTuple):
    """The outcome of a run; NaN where it has diverged."""

    accuracy: float  # of the workers' mean model on the held-out images, %
    loss: float  # mean of the workers' training losses over the last tenth of the steps, nats
    drift: float  # before the last outer step, see `Simulation.drift`


def train(
    config: slowmo.SlowMoConfig, workers: int, lr: float, seed: int, steps: int, shards: Shards, held_out: str
) -> Outcome:
    """Train, with Nesterov momentum of 0.9 and the rate at a tenth in the last fifth of the steps."""
    simulation = slowmo.Simulation(
        network,
        inner=lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
        loss=F.cross_entropy,
        workers=workers,
        config=config,
        seed=seed,
    )
    losses, drift, tau = [], 0.0, config.tau or 1
    source = batches(workers, seed, shards)
    try:
        for step in range(steps):
            if step == steps * 4 // 5:
                for group in simulation.inner_optimizer.param_groups:
                    group["lr"] /= 10
            loss = simulation.step(*next(source))
            if step >= steps * 9 // 10:
                losses.append(float(loss.mean()))
            if step % tau == tau - 2:  # the next step ends the block
                drift = simulation.drift()
        images, classes = splits()[held_out]
        right = simulation.evaluate(images, classes, lambda output, y: (output.argmax(dim=1) == y).double().mean())
    except ValueError as error:  # of the library: values that are not finite
        if "finite" not in str(error):
            raise
        return Outcome(float("nan"), float("nan"), float("nan"))
    return Outcome(100 * right, float(np.mean(losses)), drift)
