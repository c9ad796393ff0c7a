"""What a step costs: ours against what a user would pick instead, in one run, the methods in turn.

    make bench                                                     # loopback and 1 Gbit/s, 2 and 4 workers
    horovodrun -np 2 python benchmarks/step_time.py                # this network as it is

25.2 million parameters, batch 32, Nesterov SGD, tau = 12, one thread per worker. A round gives each method `--steps`
steps (a whole number of blocks); the methods take turns, `--rounds` times. Printed: the median over rounds of the mean
time of a step, and the median of its ratio to no communication in the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

from hvd_slowmo.torch import SlowMo, SlowMoConfig

TAU = 12
Step = Callable[[], None]


def network() -> nn.Module:
    """A perceptron with 25.2 million parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 4032), nn.ReLU(), nn.Linear(4032, 74))


def training(wrap: Callable[[nn.Module, torch.optim.Optimizer], torch.optim.Optimizer]) -> Step:
    model = network()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True))
    x, y = torch.randn(32, 2048), torch.randint(74, (32,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def horovod(model: nn.Module, base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return hvd.DistributedOptimizer(base, named_parameters=model.named_parameters())


def post_local(model: nn.Module, base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return PostLocalSGDOptimizer(base, PeriodicModelAverager(period=TAU, warmup_steps=0))


METHODS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], torch.optim.Optimizer]] = {
    "no communication": lambda model, base: base,
    "Horovod DistributedOptimizer": horovod,
    "PyTorch PostLocalSGD": post_local,
    "ours: Local SGD": lambda model, base: SlowMo(base, model, SlowMoConfig.local_sgd(TAU), name="local"),
    "ours: SlowMo": lambda model, base: SlowMo(base, model, SlowMoConfig(tau=TAU), name="slowmo"),
    "ours: AR-SGD": lambda model, base: SlowMo(base, model, SlowMoConfig.ar_sgd(), name="all"),
}


def measure(steps: dict[str, Step], rounds: int, count: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            hvd.barrier()
            started = time.perf_counter()
            for _ in range(count):
                step()
            hvd.barrier()
            if number:
                times[name].append((time.perf_counter() - started) / count)
            if hvd.rank() == 0 and sys.stderr.isatty():
                print(f"\rround {number} of {rounds}: {name:32}", end="", file=sys.stderr)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=TAU, help="steps per method and round (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--label", default="loopback", help="what to call this network (default: %(default)s)")
    parser.add_argument("--store", default=None, help="a new file for PyTorch's process group (default: a local port)")
    parser.add_argument("--out", type=Path, help="append the figures to this file, a line of JSON each")
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    where = f"file://{args.store}" if args.store else "tcp://127.0.0.1:29517"
    dist.init_process_group("gloo", init_method=where, rank=hvd.rank(), world_size=hvd.size())
    names = ["no communication", *(name for name in args.methods if name != "no communication")]
    times = measure({name: training(METHODS[name]) for name in names}, args.rounds, args.steps)
    if hvd.rank() == 0:
        print(
            f"\n{args.label}, {hvd.size()} workers, tau = {TAU}; median of {args.rounds} rounds of {args.steps} steps"
        )
        for name, seconds in times.items():
            ratios = [a / b for a, b in zip(seconds, times["no communication"], strict=True)]
            ratio, median = statistics.median(ratios), statistics.median(seconds)
            print(f"  {name:30} {1e3 * median:8.1f} ms per step   {ratio:6.2f} x", flush=True)
            if args.out:
                with args.out.open("a") as file:
                    row = {"network": args.label, "workers": hvd.size(), "method": name, "s": median, "ratio": ratio}
                    file.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
