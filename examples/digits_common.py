"""Options, data, the results table and the figure of the digits examples, independent of the framework.

The defaults sort the shards by class: each worker pulls towards its own digits, so the method that combines the models
matters. With randomly drawn shards, four workers and a good learning rate, all methods end within about a point of each
other. Test accuracy in % that digits_torch.py printed, mean and standard deviation:

    options                                     AR-SGD       Local SGD     SlowMo
    none (15 seeds)                             98.5 ± 0.6   94.7 ± 1.0    96.9 ± 1.0
    --first-seed 100 --seeds 6                  98.2 ± 0.9   94.4 ± 1.2    97.1 ± 1.1
    --inner-state maintain --shards random          -            98.3 ± 0.4    97.5 ± 1.0
    --lr 0.1                                    -            87.0 ± 22.5   89.4 ± 6.8

digits_keras.py, 15 seeds:                      98.4 ± 0.6   96.0 ± 0.8   97.2 ± 1.0

SlowMo does not always win: with random shards and momentum that is kept across averages, Local SGD is better; at twice
the learning rate both are unstable. The default learning rate and beta were tuned on seeds 0 to 9, which the first line
includes; the second line uses unseen seeds.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from hvd_slowmo import DPSGD, SGP, SlowMoConfig


def outer(args: Namespace, **settings: Any) -> SlowMoConfig:
    """Return SlowMo's configuration from the options; `settings` adds gossip or averaged gradients."""
    return SlowMoConfig(tau=args.tau, alpha=args.alpha, beta=args.beta, inner_state=args.inner_state, **settings)


# The methods that can be compared, each as a function from the options to a configuration.
METHODS: dict[str, Callable[[Namespace], SlowMoConfig]] = {
    "ar-sgd": lambda args: SlowMoConfig.ar_sgd(),
    "local-sgd": lambda args: SlowMoConfig.local_sgd(args.tau, inner_state=args.inner_state),
    "slowmo": outer,
    "slowmo-ar-sgd": lambda args: outer(args, gradients="all"),
    "d-psgd": lambda args: SlowMoConfig.dpsgd(),
    "slowmo-d-psgd": lambda args: outer(args, gossip=DPSGD()),
    "sgp": lambda args: SlowMoConfig.sgp(),
    "slowmo-sgp": lambda args: outer(args, gossip=SGP()),
    "slowmo-sgp-noaverage": lambda args: outer(args, gossip=SGP(), average=False),
    "osgp": lambda args: SlowMoConfig.osgp(),
    "slowmo-osgp": lambda args: outer(args, gossip=SGP(overlap=True)),
}
DEFAULT = ("ar-sgd", "local-sgd", "slowmo")  # a quick comparison; --methods selects others

# Okabe and Ito's colours, which are safe for colour-blind readers, and line styles for black-and-white print. Each
# gossip method has one colour: dashed without SlowMo, solid with it.
STYLES = {
    "ar-sgd": ("#000000", "-"),
    "local-sgd": ("#D55E00", "--"),
    "slowmo": ("#0072B2", "-."),
    "slowmo-ar-sgd": ("#000000", "-."),
    "d-psgd": ("#E69F00", "--"),
    "slowmo-d-psgd": ("#E69F00", "-"),
    "sgp": ("#009E73", "--"),
    "slowmo-sgp": ("#009E73", "-"),
    "slowmo-sgp-noaverage": ("#56B4E9", "-"),
    "osgp": ("#CC79A7", "--"),
    "slowmo-osgp": ("#CC79A7", "-"),
}


def parse(
    description: str | None,
    rank: int = 0,
    arguments: Sequence[str] | None = None,
    seeds: int = 15,
    methods: Sequence[str] = DEFAULT,
    more: Callable[[Callable[..., Any]], None] = lambda add: None,
) -> Namespace:
    """Parse the options, which all frameworks share except for some defaults. Only rank 0 prints the help.

    more: adds the options of a single example.
    """
    parser = ArgumentParser(description=description, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(methods), metavar="METHOD", help=", ".join(METHODS))
    add("--seeds", type=int, default=seeds, help="number of runs of each method, each with a different seed")
    add("--first-seed", type=int, default=0, help="seed of the first run; later runs count up from it")
    add("--epochs", type=int, default=10, help="passes of each worker over its shard of the training data")
    add("--batch-size", type=int, default=8, help="images per worker and step")
    add("--lr", type=float, default=0.05, help="learning rate, reduced to a tenth in the last fifth of the epochs")
    add(
        "--inner-state",
        choices=("maintain", "reset", "average"),
        default="reset",
        help="the inner optimizer's momentum at the start of a block of tau steps",
    )
    add(
        "--shards",
        choices=("random", "sorted"),
        default="sorted",
        help="each worker's shard of the training data: drawn at random, or sorted by class (2 to 4 classes each)",
    )
    add("--tau", type=int, default=12, help="steps between two averages of the models")
    add("--alpha", type=float, default=1.0, help="SlowMo's slow learning rate")
    add("--beta", type=float, default=0.5, help="SlowMo's slow momentum")
    add("--out", type=Path, default=Path("results"), help="directory for the results and the figure")
    add("--logdir", type=Path, help="write the metrics of every outer step to TensorBoard files in this directory")
    add("--quick", action="store_true", help="a single run of SlowMo")
    more(add)
    with redirect_stdout(StringIO() if rank else sys.stdout):
        args = parser.parse_args(arguments)
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


@dataclass
class Run:
    """Results of one run of one method."""

    method: str
    seed: int
    steps: list[int] = field(default_factory=list)  # step counts at which the curves have points
    loss: list[float] = field(default_factory=list)  # training loss since the previous point, mean over the workers
    accuracy: list[float] = field(default_factory=list)  # test accuracy of the workers' mean model, %
    ms_per_step: float = 0.0  # training only, mean over the workers
    mb_sent: float = 0.0  # 10^6 bytes handed to Horovod per worker, without start and evaluation
    ms_between: float = 0.0  # per step without an average, where measured


def table(runs: Sequence[Run]) -> str:
    """Return the results as text, one line per method."""
    lines = [f"{'method':<21}{'test accuracy, %':>18}{'ms per step':>14}{'MB sent per worker':>21}"]
    for method, mine in by_method(runs).items():
        last = [run.accuracy[-1] for run in mine]
        accuracy = f"{np.mean(last):.1f}" + (f" ± {np.std(last, ddof=1):.1f}" if len(last) > 1 else "")
        # The median ignores a run during which the machine was busy with something else.
        speed, sent = np.median([run.ms_per_step for run in mine]), np.mean([run.mb_sent for run in mine])
        lines.append(f"{method:<21}{accuracy:>18}{speed:>14.2f}{sent:>21.2f}")
    return "\n".join(lines)


def draw_figure(runs: Sequence[Run], title: str, path: Path) -> None:
    """Plot loss and accuracy over the steps: the mean over the seeds and a band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for method, mine in by_method(runs).items():
        colour, line = STYLES[method]
        for axis, curves in zip(axes, ([run.loss for run in mine], [run.accuracy for run in mine]), strict=True):
            mean, spread = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1 if len(curves) > 1 else 0)
            axis.plot(mine[0].steps, mean, line, marker=".", color=colour, label=method)
            axis.fill_between(mine[0].steps, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    axes[0].set(xlabel="step", ylabel="training loss of the workers' own models (nats)", yscale="log")
    axes[1].set(xlabel="step", ylabel="test accuracy of the workers' mean model (%)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group the runs by method, in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def report(name: str, args: Namespace, runs: Sequence[Run], workers: int) -> None:
    """Print the table, and write NAME.json and NAME.png to the directory `args.out`."""
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    results = {"workers": workers, "settings": settings, "runs": [asdict(run) for run in runs]}
    (args.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    seeds = f"{args.seeds} seeds (bands: ± standard deviation)" if args.seeds > 1 else f"seed {args.first_seed}"
    draw_figure(
        runs,
        f"Digits on {workers} workers, shards {args.shards}: τ = {args.tau}, α = {args.alpha:g}, β = {args.beta:g}, "
        f"inner state {args.inner_state}, {seeds}",
        args.out / f"{name}.png",
    )
    print(f"\n{table(runs)}\n\nWritten: {args.out / name}.json, {args.out / name}.png", flush=True)
