"""Time an outer step alone, without inner steps in between: less noise than `step_time.py`.

    torchrun --nproc-per-node 2 benchmarks/exchange.py
    horovodrun -np 2 python benchmarks/exchange.py

25.2 million float32 parameters, one thread per worker, an inner optimizer that does nothing. The methods take turns:
one gloo allreduce of as many values, the lower bound of any average; the same in pieces of 16 MiB that are started
together; the averaging of PyTorch's PostLocalSGDOptimizer; our Local SGD; our SlowMo. Prints medians, and the median
ratio to the allreduce of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from transport import add_store, connect
from transport import name as transport_name

from hvd_slowmo.core.parts.layout import CHUNK_BYTES
from hvd_slowmo.torch import SlowMo, SlowMoConfig

SIZES = (2048 * 4096, 4096, 4096 * 4032, 4032, 4032 * 74, 74)


class Idle(torch.optim.SGD):
    """Inner optimizer that does nothing."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch overloads it
        pass


def network() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.rand(size)) for size in SIZES])


def ours(config: SlowMoConfig, name: str, transport: dict[str, Any]) -> Callable[[], object]:
    model = network()
    return SlowMo(Idle(model.parameters(), lr=0.1), model, config, name=name, **transport).step


def in_pieces(flat: torch.Tensor) -> None:
    for begun in [dist.all_reduce(piece, async_op=True) for piece in flat.split(CHUNK_BYTES // 4)]:
        begun.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="number of measured rounds (default: %(default)s)")
    add_store(parser)
    args = parser.parse_args()
    transport = connect(args.store)
    torch.set_num_threads(1)
    flat, theirs = torch.rand(sum(SIZES)), network()
    ways = {
        "gloo allreduce": lambda: dist.all_reduce(flat),
        "gloo allreduce in pieces": lambda: in_pieces(flat),
        "PyTorch average_parameters": lambda: average_parameters(theirs.parameters(), dist.group.WORLD),
        "ours: Local SGD": ours(SlowMoConfig.local_sgd(1), "local", transport),
        "ours: SlowMo": ours(SlowMoConfig(tau=1), "slowmo", transport),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):  # the first round warms up
        for name, way in ways.items():
            flat.fill_(1.0)
            dist.barrier()
            started = time.perf_counter()
            way()
            dist.barrier()
            if number:
                times[name].append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        print(f"ours over {transport_name()}, {dist.get_world_size()} workers")
        for name, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, times["gloo allreduce"], strict=True))
            print(f"  {name:28} {1e3 * statistics.median(seconds):8.1f} ms  {ratio:6.2f} x")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
