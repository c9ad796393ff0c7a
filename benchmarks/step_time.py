"""What a step costs: ours against what a user would pick instead, in one run, the methods in turn.

    make bench                                                     # loopback and 1 Gbit/s, 2 and 4 workers
    horovodrun -np 2 python benchmarks/step_time.py                # this network as it is

25.2 million parameters, batch 32, Nesterov SGD, tau = 12, one thread per worker. A round gives each method `--steps`
steps (a whole number of blocks); the methods take turns, `--rounds` times. Printed: the median over rounds of the mean
time of a step, and the median of its ratio to no communication in the same round.
"""

from __future__ import annotations

from collections.abc import Callable

import horovod.torch as hvd
import torch
import torch.distributed as dist
import turns
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

from hvd_slowmo.torch import SlowMo, SlowMoConfig

TAU = turns.TAU


def network() -> nn.Module:
    """A perceptron with 25.2 million parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 4032), nn.ReLU(), nn.Linear(4032, 74))


def training(wrap: Callable[[nn.Module, torch.optim.Optimizer], torch.optim.Optimizer]) -> turns.Step:
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


def main() -> None:
    parser = turns.options(__doc__, METHODS)
    parser.add_argument("--store", default=None, help="a new file for PyTorch's process group (default: a local port)")
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    where = f"file://{args.store}" if args.store else "tcp://127.0.0.1:29517"
    dist.init_process_group("gloo", init_method=where, rank=hvd.rank(), world_size=hvd.size())
    turns.run(hvd, args, lambda name: training(METHODS[name]), hvd.barrier)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
