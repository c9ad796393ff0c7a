"""Save, load and damage checkpoints of PyTorch workers."""

import torch
from torch import nn

from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.problems import Problem
from support.trainings.pytorch import advance, build, held

RESET = Problem({"tau": 4, "inner_state": "reset"}, options={"momentum": 0.875})


def saved(path, workers, steps, problem=RESET, join=False, before=lambda optimizer: None):
    """Save a checkpoint of some workers after some steps; return their values."""

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        before(optimizer)
        advance(problem, model, optimizer, comm.rank, range(steps))
        if join:
            optimizer.join()
        optimizer.save(path)
        return held(model, optimizer)

    return ThreadWorld(workers).run(work)


def loaded(path, workers, problem=RESET, then=0):
    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        optimizer.load(path)
        advance(problem, model, optimizer, comm.rank, range(optimizer.steps, optimizer.steps + then))
        return held(model, optimizer)

    return ThreadWorld(workers).run(work)


def damaged(files, rng):
    """Damage one of the files."""
    file = files[rng.integers(len(files))]
    data = bytearray(file.read_bytes())
    at = int(rng.integers(len(data)))
    kind = ["flip", "header", "byte", "truncate", "append", "cut", "swap"][rng.integers(7)]
    if kind == "flip":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "header":
        data[at % (8 + int.from_bytes(data[:8], "little"))] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        data[at] = (data[at] + int(rng.integers(1, 256))) % 256
    elif kind == "truncate":
        del data[at:]
    elif kind == "append":
        data += bytes(int(rng.integers(1, 9)))
    elif kind == "cut":
        del data[at]
    else:
        other = files[(files.index(file) + 1) % len(files)]
        data = bytearray(other.read_bytes())
    file.write_bytes(data)
    return kind


def files(path):
    """Return the checkpoint's files, keyed by their suffix to its name."""
    return {file.name[len(path.name) :]: file.read_bytes() for file in path.parent.glob(f"{path.name}*")}


def one(config=None, groups=None, model=None, base=None):
    """Return a single worker's model and optimizer."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    base = base or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5))
    optimizer = SlowMo(base(groups(model) if groups else model.parameters()), model, config or CONFIG, comm=SoloComm())
    return model, optimizer


CONFIG = SlowMoConfig(tau=3)


def train(model, optimizer, steps):
    for k in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(k))).square().mean().backward()
        optimizer.step()
