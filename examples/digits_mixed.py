"""One model trained by PyTorch and Keras workers together, on scikit-learn's handwritten digits.

Workers of even rank run the network in PyTorch, those of odd rank run the same network in Keras. Without horovodrun the
script launches this job and the same one on PyTorch alone and on Keras alone, and compares the three; --quick launches
the mixed job alone. Under horovodrun the script is a worker of one job.

Run it with: python examples/digits_mixed.py
         or: horovodrun -np 4 python examples/digits_mixed.py
"""

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import comparison
import digits_common as common
import numpy as np
from progress import Progress

KINDS = ("mixed", "torch", "keras")
FILES = {"mixed": "digits_mixed", "torch": "digits_torch_alone", "keras": "digits_keras_alone"}
COLOURS = {"mixed": ("#0072B2", "-"), "torch": ("#D55E00", "--"), "keras": ("#009E73", "-.")}
NAMES = {"torch": "PyTorch", "keras": "Keras"}


class Torch:
    """A PyTorch worker."""

    def __init__(self, args: Namespace) -> None:
        import horovod.torch as hvd
        import torch

        hvd.init()
        torch.set_num_threads(1)  # several workers share this machine's cores
        self._torch, self._hvd, self._args = torch, hvd, args
        self.rank, self.size = hvd.rank(), hvd.size()

    def begin(self, method: str, seed: int) -> None:
        """Start a new run. A collective."""
        import digits_torch

        import hvd_slowmo.torch as slowmo

        self._torch.manual_seed(seed)
        self.model = digits_torch.network()
        inner = self._torch.optim.SGD(self.model.parameters(), lr=self._args.lr, momentum=0.9, nesterov=True)
        config = comparison.METHODS[method](self._args)
        # The Keras network has the same layers in the same order, so the map needs no entries.
        self.optimizer = slowmo.SlowMo(inner, self.model, config, parameter_map=slowmo.ParameterMap())

    def step(self, images: np.ndarray, classes: np.ndarray, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        output = self.model(self._torch.from_numpy(images))
        loss = self._torch.nn.functional.cross_entropy(output, self._torch.from_numpy(classes))
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def predict(self, images: np.ndarray) -> np.ndarray:
        with self._torch.no_grad():
            return self.model(self._torch.from_numpy(images)).argmax(dim=1).numpy()

    def total(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over all workers."""
        return self._hvd.allreduce(self._torch.from_numpy(values), op=self._hvd.Sum, name="digits").numpy()


class Keras:
    """A Keras worker. All runs of a method reuse its traced functions."""

    def __init__(self, args: Namespace) -> None:
        import horovod.tensorflow as hvd
        import keras
        import tensorflow as tf

        hvd.init()
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self._tf, self._hvd, self._keras, self._args = tf, hvd, keras, args
        self.rank, self.size = hvd.rank(), hvd.size()
        self._made: dict[str, Any] = {}

        @tf.function(autograph=False)  # a function keeps the name; the prefix matches PyTorch's
        def total(values: Any) -> Any:
            return hvd.allreduce(values, op=hvd.Sum, name="allreduce.digits")

        self._total = total

    def begin(self, method: str, seed: int) -> None:
        """Start a new run. A collective."""
        import digits_keras

        if method not in self._made:
            self._made[method] = self._make(method)
        self.model, self.optimizer, self._step = self._made[method]
        self._keras.utils.set_random_seed(seed)
        self.model.set_weights(digits_keras.network().get_weights())
        for variable in self.optimizer.variables:
            variable.assign(self._keras.ops.zeros_like(variable))
        self.optimizer.broadcast(self.model)

    def _make(self, method: str) -> tuple[Any, Any, Any]:
        import digits_keras

        import hvd_slowmo.tf as slowmo

        tf, model = self._tf, digits_keras.network()
        inner = self._keras.optimizers.SGD(self._args.lr, momentum=0.9, nesterov=True)
        config = comparison.METHODS[method](self._args)
        optimizer = slowmo.SlowMo(inner, config, parameter_map=slowmo.ParameterMap())
        optimizer.build(model.trainable_variables)
        criterion = self._keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        @tf.function(autograph=False)
        def step(images: Any, classes: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = criterion(classes, model(images, training=True))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            return loss

        return model, optimizer, step

    def step(self, images: np.ndarray, classes: np.ndarray, rate: float) -> float:
        self.optimizer.learning_rate = rate
        return float(self._step(self._tf.constant(images), self._tf.constant(classes)))

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.model(images).numpy().argmax(axis=1)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over all workers."""
        return self._total(self._tf.constant(values)).numpy()


def train(
    args: Namespace, worker: Torch | Keras, method: str, seed: int, data: common.Data, progress: Progress
) -> comparison.Run:
    """Train one method with one seed, in either framework."""
    run = comparison.Run(method, seed)
    worker.begin(method, seed)
    optimizer = worker.optimizer
    mine = common.shard(data.train_classes, args.shards, worker.rank, worker.size, seed)
    rng = np.random.default_rng([seed, worker.rank])
    late = args.epochs - args.epochs // 5
    clock, between, sent = [], [], optimizer.bytes_sent  # seconds of all steps, and of those without an average
    for epoch in range(args.epochs):
        losses = []
        first = epoch == 0 and args.epochs > 1  # TensorFlow traces in the first epoch
        for batch in common.batches(mine, args.batch_size, rng):
            rate = args.lr * (0.1 if epoch >= late else 1)
            begin = time.perf_counter()
            losses.append(worker.step(data.train_images[batch], data.train_classes[batch], rate))
            if not first:
                clock.append(time.perf_counter() - begin)
                if optimizer.steps % args.tau:
                    between.append(clock[-1])
            progress.update()
        run.mb_sent = (optimizer.bytes_sent - sent) / 1e6
        run.steps.append(optimizer.steps)
        optimizer.join()  # all workers hold the mean
        run.loss.append(float(worker.total(np.array([np.mean(losses)]))[0]) / worker.size)
        right = worker.predict(data.test_images) == data.test_classes
        run.score.append(100 * float(np.mean(right)))
    run.ms_per_step, run.ms_between = 1000 * float(np.mean(clock)), 1000 * float(np.mean(between))
    return run


def compare(args: Namespace, worker: Torch | Keras, runs: list[comparison.Run], data: common.Data) -> None:
    """Print each worker's test results with the common model of the last run, and its time per step."""
    table = np.zeros((worker.size, len(data.test_classes) + 2))
    table[worker.rank, :-2] = worker.predict(data.test_images)
    table[worker.rank, -2:] = np.median([[run.ms_per_step, run.ms_between] for run in runs], axis=0)
    table = worker.total(table.reshape(-1)).reshape(table.shape)
    if worker.rank:
        return
    for rank, row in enumerate(table):
        right = int((row[:-2] == data.test_classes).sum())
        name = NAMES[framework(args.frameworks, rank)]
        print(
            f"rank {rank}, {name:8}{right} of {len(data.test_classes)} test images right; "
            f"{row[-2]:.2f} ms per step, {row[-1]:.2f} without an average"
        )
    same = int((table[:, :-2] == table[0, :-2]).all(axis=0).sum())
    print(f"The workers classify {same} of {len(data.test_classes)} test images alike.")


def framework(kind: str, rank: int) -> str:
    """Return the framework of a worker."""
    return ("torch", "keras")[rank % 2] if kind == "mixed" else kind


def work(args: Namespace, rank: int) -> None:
    """Run as a worker of one job."""
    worker = (Torch if framework(args.frameworks, rank) == "torch" else Keras)(args)
    data = common.load()
    steps = args.epochs * common.steps_per_epoch(data, args.batch_size, worker.size)
    total = steps * args.seeds * len(args.methods)
    runs = []
    with Progress(total, rank) as progress:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for method in args.methods:
                progress.describe(f"{args.frameworks}, {method}, seed {seed}")
                runs.append(train(args, worker, method, seed, data, progress))
    compare(args, worker, runs, data)
    if rank == 0:
        report(args, runs, worker.size, FILES[args.frameworks])


def report(args: Namespace, runs: list[comparison.Run], workers: int, name: str) -> None:
    """Report a line and a curve for each method and kind of workers."""
    for run in runs:
        if "," not in run.method:
            run.method = f"{run.method}, {args.frameworks}"
        comparison.STYLES[run.method] = COLOURS[run.method.rpartition(", ")[2]]
    common.report(name, args, runs, workers)


def launch(args: Namespace) -> None:
    """Launch a job for each kind of workers, and report all of them in one table."""
    launcher = shutil.which("horovodrun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if launcher is None:
        sys.exit("horovodrun is not installed. Run: hvd-slowmo install-horovod")
    runs = []
    for kind in KINDS[: 1 if args.quick else None]:
        command = [launcher, "-np", str(args.workers), sys.executable, *sys.argv, "--frameworks", kind]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"the {kind} job failed")
        found = json.loads((args.out / f"{FILES[kind]}.json").read_text(encoding="utf-8"))
        runs += [comparison.Run(**run) for run in found["runs"]]
    if len(comparison.by_method(runs)) > 1:
        report(args, runs, args.workers, FILES["mixed"])


def main() -> None:
    rank = os.environ.get("HOROVOD_RANK")
    args = common.parse(__doc__, int(rank or 0), seeds=5, methods=("slowmo",), more=options)
    if rank is None:
        launch(args)
    else:
        work(args, int(rank))


def options(add: Any) -> None:
    add("--frameworks", choices=KINDS, default="mixed", help="frameworks of the workers of a job under horovodrun")
    add("--workers", type=int, default=4, help="number of workers to launch without horovodrun")


if __name__ == "__main__":
    main()
