"""Options and data of the digits examples, independent of the framework.

The defaults sort the shards by class: each worker pulls towards its own digits, so the method that combines the models
matters. With randomly drawn shards, four workers and a good learning rate, all methods end within about a point of each
other. Test accuracy in % that digits_torch.py printed, mean and standard deviation:

    options                                              AR-SGD       Local SGD     SlowMo
    --seeds 15                                           98.5 ± 0.6   94.7 ± 1.0    96.9 ± 1.0
    --first-seed 100 --seeds 6                           98.2 ± 0.9   94.4 ± 1.2    97.1 ± 1.1
    --seeds 15 --inner-state maintain --shards random    -            98.3 ± 0.4    97.5 ± 1.0
    --seeds 15 --lr 0.1                                  -            87.0 ± 22.5   89.4 ± 6.8

digits_keras.py --seeds 15:                              98.4 ± 0.6   96.0 ± 0.8   97.2 ± 1.0

SlowMo does not always win: with random shards and momentum that is kept across averages, Local SGD is better; at twice
the learning rate both are unstable. The default learning rate and beta were tuned on seeds 0 to 9, which the first line
includes; the second line uses unseen seeds.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import comparison
import numpy as np
from sklearn.datasets import load_digits

DEFAULT = ("ar-sgd", "local-sgd", "slowmo")  # a quick comparison; --methods selects others


def parse(
    description: str | None,
    rank: int = 0,
    arguments: Sequence[str] | None = None,
    seeds: int = 3,
    methods: Sequence[str] = DEFAULT,
    more: Callable[[Callable[..., Any]], None] = lambda add: None,
) -> Namespace:
    """Parse the options, which all frameworks share except for some defaults. Only rank 0 prints the help.

    more: adds the options of a single example.
    """
    parser = comparison.make_parser(description)
    add = parser.add_argument
    comparison.add_method_options(add, methods=methods, seeds=seeds, inner_state="reset")
    add("--epochs", type=int, default=10, help="passes of each worker over its shard of the training data")
    add("--batch-size", type=int, default=8, help="images per worker and step")
    add("--lr", type=float, default=0.05, help="learning rate, reduced to a tenth in the last fifth of the epochs")
    add(
        "--shards",
        choices=("random", "sorted"),
        default="sorted",
        help="each worker's shard of the training data: drawn at random, or sorted by class (2 to 4 classes each)",
    )
    add("--metrics", action="store_true", help="measure at every outer step, and show a table of some for each run")
    add("--quick", action="store_true", help="a single run of SlowMo")
    more(add)
    args = comparison.parse(parser, rank, arguments)
    if args.quick:
        args.methods, args.seeds = ["slowmo"], 1
    return args


class Data(NamedTuple):
    """Images (n, 8, 8), float32 in [0, 1], and classes (n,), int64."""

    train_images: np.ndarray
    train_classes: np.ndarray
    test_images: np.ndarray
    test_classes: np.ndarray


def load() -> Data:
    """Load scikit-learn's digits, with a fixed split into 1,437 training and 360 test images."""
    digits = load_digits()
    images, classes = (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(classes))
    train, test = order[:1437], order[1437:]
    return Data(images[train], classes[train], images[test], classes[test])


def shard(classes: np.ndarray, how: str, rank: int, size: int, seed: int) -> np.ndarray:
    """Return the indices of this worker's examples. Shards are disjoint and have equal size."""
    order = np.random.default_rng(seed).permutation(len(classes))
    if how == "sorted":
        order = order[np.argsort(classes[order], kind="stable")]
    count = len(classes) // size
    return order[rank * count : (rank + 1) * count]


def batches(indices: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the batches of one epoch in random order, without a partial one: all workers take equally many steps."""
    order = rng.permutation(indices)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def steps_per_epoch(data: Data, batch_size: int, size: int) -> int:
    """Return the number of batches of each worker per epoch."""
    steps = len(data.train_classes) // size // batch_size
    if steps == 0:
        raise ValueError(f"{len(data.train_classes)} images are too few for {size} workers and {batch_size} a batch.")
    return steps


def report(name: str, args: Namespace, runs: Sequence[comparison.Run], workers: int) -> None:
    """Print the tables, and write NAME.json and NAME.png to the directory `args.out`."""
    for run in runs if args.metrics else ():
        from metrics_table import metrics_table  # needs rich
        from rich.console import Console

        Console().print(metrics_table(run.metrics, f"{run.method}, seed {run.seed}"))
    comparison.report(name, args, runs, workers, task=f"Digits, shards {args.shards},")
