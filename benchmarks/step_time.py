"""Compare the time of a step under SlowMo and its alternatives; the methods take turns in one run.

    make bench                                                     # loopback and 1 Gbit/s, 2 and 4 workers
    torchrun --nproc-per-node 2 benchmarks/step_time.py            # the network as it is, over torch.distributed
    horovodrun -np 2 python benchmarks/step_time.py                # the same over Horovod

25.2 million parameters, batch 32, Nesterov SGD, tau = 12, one thread per worker. In each of `--rounds` rounds, each
method takes `--steps` steps (rounded up to whole blocks). Prints the median over rounds of the mean time of a step, the
minimum, which depends less on other load, and the median ratio to no communication in the same round.

With gossip, tau is 48, as in the paper. Select these methods by name, and give the methods that they are compared with
as many steps: --methods "ours: SGP" "ours: SlowMo over SGP" --steps 48. "the message alone" sends the message of one
gossip step and computes nothing. --batch-size and --shrink lengthen computation and shorten messages, until both take
equally long; --pause replaces forward and backward by a wait, as if a separate device computed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import turns
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel
from transport import add_store, connect
from transport import name as transport_name

from hvd_slowmo.torch import SlowMo, SlowMoConfig

torchft = importlib.import_module("torchft_methods") if importlib.util.find_spec("torchft") else None
TAU = turns.TAU
Wrap = Callable[[nn.Module, torch.optim.Optimizer], tuple[nn.Module, torch.optim.Optimizer]]


def network(shrink: int = 1) -> nn.Module:
    """Return a perceptron with 25.2 million parameters, divided by about shrink^2."""
    torch.manual_seed(0)
    a, b, c = 2048 // shrink, 4096 // shrink, 4032 // shrink
    return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, 74))


def message(shrink: int) -> turns.Step:
    """Return a step that sends a gossip message on the topology "exponential", without computation."""
    x = torch.rand(sum(p.numel() for p in network(shrink).parameters()))
    sizes = [
        len(x) if rank == (dist.get_rank() + 1) % dist.get_world_size() else 0 for rank in range(dist.get_world_size())
    ]
    if transport_name() == "torch.distributed":
        sources = [
            len(x) if (rank + 1) % dist.get_world_size() == dist.get_rank() else 0
            for rank in range(dist.get_world_size())
        ]
        return lambda: dist.all_to_all_single(torch.empty_like(x), x, sources, sizes)
    import horovod.torch as hvd

    splits = torch.tensor(sizes, dtype=torch.int32)

    def step() -> None:
        handle = hvd.alltoall_async(x, splits, name="message")
        while not hvd.poll(handle):
            time.sleep(0.0002)
        hvd.synchronize(handle)

    return step


def training(wrap: Wrap, batch: int, shrink: int, pause: float | None) -> turns.Step:
    model = network(shrink)
    model, optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True))
    x, y = torch.randn(batch, 2048 // shrink), torch.randint(74, (batch,))

    if pause is not None:  # a device computes while the host's cores are idle
        nn.functional.cross_entropy(model(x), y).backward()
        gradients = [(p, p.grad) for p in model.parameters()]

        def paused() -> None:
            time.sleep(pause / 1e3)
            for p, gradient in gradients:  # torchft's outer optimizer clears them, and a step without any costs nothing
                p.grad = gradient
            optimizer.step()

        return paused

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def horovod(model: nn.Module, inner: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    import horovod.torch as hvd

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return model, hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters())


def post_local(model: nn.Module, inner: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=TAU, warmup_steps=0))


def ours(config: SlowMoConfig, name: str, transport: dict[str, Any]) -> Wrap:
    return lambda model, inner: (model, SlowMo(inner, model, config, name=name, **transport))


METHODS: dict[str, Wrap] = {
    "no communication": lambda model, inner: (model, inner),
    "PyTorch PostLocalSGD": post_local,
}
if transport_name() == "torch.distributed":
    METHODS["PyTorch DDP"] = lambda model, inner: (DistributedDataParallel(model), inner)
    if torchft is not None:
        METHODS.update(torchft.methods(TAU))
else:
    METHODS["Horovod DistributedOptimizer"] = horovod


def main() -> None:
    parser = turns.options(__doc__, METHODS)
    parser.add_argument("--batch-size", type=int, default=32, help="per worker and step (default: %(default)s)")
    add_store(parser)
    args = parser.parse_args()
    transport = connect(args.store)
    torch.set_num_threads(1)
    wraps = {**METHODS}
    for name, (config, mark) in turns.ours(args.tau_gossip).items():
        wraps[name] = ours(config, mark, transport)

    def make(name: str) -> turns.Step:
        if name == turns.MESSAGE:
            return message(args.shrink)
        return training(wraps[name], args.batch_size, args.shrink, args.pause)

    args.label = f"{args.label}, {transport_name()}"
    turns.run(args, make, dist.barrier, dist.get_rank(), dist.get_world_size())
    if torchft is not None:
        torchft.check_committed()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
