"""Trainings with two optimizers."""

import torch

import hvd_slowmo.torch as slowmo


def optimizer(config, comm, seed, **options):
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(1.0, p.numel() + 1).view_as(p) / (3 + seed))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    return slowmo.SlowMo(inner, model, slowmo.SlowMoConfig(**config), comm=comm, **options)


def step(one, rank, number):
    one.zero_grad()
    x = torch.full((4, 3), 1.0 + rank + number)
    (one.worker.model(x) ** 2).mean().mul(0.01).backward()
    one.step()


def weights(one):
    return torch.cat([p.detach().flatten() for p in one.worker.model.parameters()])


def train(config, steps, comms):
    """Take two steps of the second optimizer after each of the first one, in two epochs."""
    both = [optimizer(config, comm, seed) for seed, comm in enumerate(comms)]
    behind = []
    for _ in range(2):
        for number in range(steps):
            step(both[0], comms[0].rank, number)
            step(both[1], comms[0].rank, number)
            step(both[1], comms[0].rank, number)
        behind.append(slowmo.join(*both))
    return [(weights(one), [each[place].behind for each in behind]) for place, one in enumerate(both)]


def alone(config, steps, comm, place):
    """Train one of the two."""
    one = optimizer(config, comm, place)
    behind = []
    for _ in range(2):
        for number in range(steps):
            for _ in range(1 + place):
                step(one, comm.rank, number)
        behind.append(one.join().behind)
    return weights(one), behind


def crossed(config, lengths):
    both = [optimizer(config, None, seed) for seed in range(2)]
    order = both if slowmo.rank() == 0 else both[::-1]  # of their joins
    for _ in range(2):
        for number in range(lengths[slowmo.rank()]):
            for one in both:
                step(one, slowmo.rank(), number)
        slowmo.join(*order)
    return [(weights(one), one.steps) for one in both]
