"""A task for hvd-slowmo simulate: scikit-learn's handwritten digits, with shards that are sorted by class.

Run it in this directory with:
hvd-slowmo simulate simulate_digits:task --workers 8 32 128 --tau 4 12 48 --beta 0 .5 .7
"""

from collections.abc import Iterator

import digits_common as common
import torch
from torch import nn
from torch.nn import functional as F

import hvd_slowmo.torch as slowmo

BATCH = 16
DATA = [torch.from_numpy(array) for array in common.load()]
IMAGES, CLASSES, TEST_IMAGES, TEST_CLASSES = DATA


def network() -> nn.Module:
    """Return a small network for images of shape (n, 8, 8)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def batches(workers: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a batch for each worker from its own shard: images of shape (workers, BATCH, 8, 8), and classes."""
    shards = [common.shard(CLASSES.numpy(), "sorted", rank, workers, seed) for rank in range(workers)]
    own = torch.stack([torch.from_numpy(shard) for shard in shards])
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = own.gather(1, torch.randint(own.shape[1], (workers, BATCH), generator=generator))
        yield IMAGES[drawn], CLASSES[drawn]


def accuracy(output: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return the share of correctly classified images, in %."""
    return 100 * (output.argmax(dim=1) == classes).double().mean()


def task() -> slowmo.SimulationTask:
    """Return the task."""
    return slowmo.SimulationTask(
        model=network,
        inner=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
        loss=F.cross_entropy,
        batches=batches,
        test=(TEST_IMAGES, TEST_CLASSES),
        metric=accuracy,
        steps=480,
    )
