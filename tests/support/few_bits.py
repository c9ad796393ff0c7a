"""A small model under few bits, each worker of which is drawn to a place of its own in every step."""

import numpy as np
import torch
from torch import nn

from hvd_slowmo.torch import SlowMo, SlowMoConfig, rank

BITS = [16, 8, 4]
SHAPE = (50, 70)  # 3500 values: four blocks, the last in part


class Weights(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.weight = nn.Parameter(torch.tensor(rng.normal(size=SHAPE), dtype=torch.float32))
        self.bias = nn.Parameter(torch.tensor(rng.normal(size=5), dtype=torch.float32))


def build(comm, lr=0.125, metrics=False, **settings):
    model = Weights()
    config = SlowMoConfig(**{"tau": 4, "bits": 8, **settings})
    inner = torch.optim.SGD(model.parameters(), lr=lr)
    return model, SlowMo(inner, model, config, comm=comm, metrics=metrics)


def centre(rank, k, shape):
    """Return the place to which the weights are drawn in a step."""
    return torch.tensor(np.random.default_rng([rank, k]).normal(size=shape), dtype=torch.float32)


def step(model, optimizer, rank, k):
    for p in model.parameters():
        p.grad = p.detach() - centre(rank, k, p.shape)
    optimizer.step()


def entry(optimizer):
    return optimizer.state_dict()["slowmo"]


def flat(optimizer, name):
    """Return a vector of the weight matrix, which comes first."""
    return entry(optimizer)["vectors"][name][0][: np.prod(SHAPE)].numpy().copy()


def trained(settings, comm=None):
    """Train a few steps on a worker of a pool, or of a world."""
    number = rank() if comm is None else comm.rank
    model, optimizer = build(comm, **settings)
    for k in range(13 + number):
        step(model, optimizer, number, k)
    optimizer.join()
    return {name: value.numpy() for name, value in model.state_dict().items()}
