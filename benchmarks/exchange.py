"""Time an outer step alone, without inner steps in between: less noise than `step_time.py`.

    horovodrun -np 2 python benchmarks/exchange.py

25.2 million float32 parameters, one thread per worker, an inner optimizer that does nothing. The methods take turns:
one gloo allreduce of as many values, the lower bound of any average; the averaging of PyTorch's PostLocalSGDOptimizer;
our Local SGD; our SlowMo. Prints medians, and the median ratio to the allreduce of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.utils import average_parameters

from hvd_slowmo.torch import SlowMo, SlowMoConfig

SIZES = (2048 * 4096, 4096, 4096 * 4032, 4032, 4032 * 74, 74)


class Idle(torch.optim.SGD):
    """Inner optimizer that does nothing."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch overloads it
        pass


def network() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.rand(size)) for size in SIZES])


def ours(config: SlowMoConfig, name: str) -> Callable[[], object]:
    model = network()
    return SlowMo(Idle(model.parameters(), lr=0.1), model, config, name=name).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="number of measured rounds (default: %(default)s)")
    rounds = parser.parse_args().rounds
    hvd.init()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29518", rank=hvd.rank(), world_size=hvd.size())
    flat, theirs = torch.rand(sum(SIZES)), network()
    ways = {
        "gloo allreduce": lambda: dist.all_reduce(flat),
        "PyTorch average_parameters": lambda: average_parameters(theirs.parameters(), dist.group.WORLD),
        "ours: Local SGD": ours(SlowMoConfig.local_sgd(1), "local"),
        "ours: SlowMo": ours(SlowMoConfig(tau=1), "slowmo"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first round warms up
        for name, way in ways.items():
            flat.fill_(1.0)
            hvd.barrier()
            started = time.perf_counter()
            way()
            hvd.barrier()
            if number:
                times[name].append(time.perf_counter() - started)
    if hvd.rank() == 0:
        for name, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, times["gloo allreduce"], strict=True))
            print(f"{hvd.size()} workers  {name:28} {1e3 * statistics.median(seconds):8.1f} ms  {ratio:6.2f} x")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
