"""Jobs for workers of torch.distributed (see ../pool.py): what Horovod does not have."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo
from support.jobs.pytorch import goes_on, train
from support.trainings.mixed import TorchComm


def optimizer(model: nn.Module, **settings) -> SlowMo:
    return SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, **{"tau": 2, **settings})


def spread() -> dict[str, str]:
    """Give SlowMo models that PyTorch has spread over the workers; return what it says to each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel

    sharded = nn.Linear(4, 2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded.weight = nn.Parameter(distribute_tensor(sharded.weight.detach(), mesh, [Shard(0)]))
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    within = DistributedDataParallel(nn.Linear(4, 2), process_group=alone)
    cases = {
        "dtensor": (sharded, {}),
        "ddp": (DistributedDataParallel(nn.Linear(4, 2)), {}),
        "averaged twice": (within, {"gradients": "all"}),
        "ddp within nodes": (within, {}),
    }
    told = {}
    for name, (model, settings) in cases.items():
        try:
            made = optimizer(model, **settings)
        except ValueError as error:
            told[name] = str(error)
            continue
        for _ in range(2):
            made.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            made.step()
        told[name] = "trained"
    return told


def misuse(kind: str) -> tuple[str, float]:
    """Do something else on rank 1; return the error, and what training gives afterwards."""
    odd, said = slowmo.rank() == 1, "nothing was raised"
    model = nn.Linear(3, 4)
    try:
        if kind == "other optimizer first":
            for name in ("a", "b") if odd else ("b", "a"):
                optimizer(model, name=name)
        else:
            made = optimizer(model)
            train(model, made, 1)
            if odd:
                made.save(f"{tempfile.mkdtemp()}/checkpoint")
            train(model, made, 1)
    except ValueError as error:
        said = str(error)
    return said, goes_on()


def own_collectives() -> bool:
    """Run collectives of the script while an optimizer's are in flight: OSGP keeps messages between two steps."""
    model = nn.Linear(3, 4)
    made = optimizer(model, gossip=slowmo.SGP(overlap=True))
    results = []
    for _ in range(5):
        begun = dist.all_reduce(x := torch.ones(7), async_op=True)
        train(model, made, 1)
        begun.wait()
        results.append(x.tolist() == [dist.get_world_size()] * 7)
    made.join()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, model.weight.tolist())
    return all(results) and everyone[0] == everyone[1]


def late() -> str:
    """Let rank 1 come later than the process group's timeout."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    model = nn.Linear(3, 4)
    made = optimizer(model, process_group=group)
    if slowmo.rank() == 1:
        time.sleep(8)
    said = []
    for _ in range(2):
        try:
            train(model, made, 2)
        except RuntimeError as error:
            said.append(str(error))
    return " | ".join(said)


def nodes() -> tuple[list[float], list[float]]:
    """Train two nodes of two workers with gradients averaged within them, on threads and here."""

    def history(comm=None) -> list[float]:
        rank = slowmo.rank() if comm is None else comm.rank
        model = nn.Linear(3, 2).double()
        with torch.no_grad():
            model.weight.copy_(torch.arange(6.0).reshape(2, 3))
            model.bias.zero_()
        made = optimizer(model, tau=4, gradients="node", comm=None if comm is None else TorchComm(comm))
        seen = []
        for k in range(6):
            made.zero_grad()
            model(torch.full((1, 3), float(rank + k), dtype=torch.float64)).square().sum().mul(2**-7).backward()
            made.step()
            seen.append(model.weight.sum().item())
        made.join()
        return [*seen, model.weight.sum().item()]

    os.environ["GROUP_RANK"] = str(slowmo.rank() // 2)  # as of two agents of torchrun
    return ThreadWorld(4, node_size=2).run(history)[slowmo.rank()], history()
