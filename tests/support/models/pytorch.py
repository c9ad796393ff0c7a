"""PyTorch models for the contract's tests, their batches, and the values to compare."""

import torch
from torch import nn

from hvd_slowmo.torch import SlowMo, SlowMoConfig

BARE = SlowMoConfig.local_sgd(1)  # on one worker, the inner optimizer alone


def filled(model, seed=0):
    """Fill the model from a separate random generator, since threads share torch's global one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def batch(rank, k, *shape):
    return torch.randn(*(shape or (8, 4)), generator=torch.Generator().manual_seed(100 * rank + k))


def net(seed=0):
    return filled(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), seed)


def matrices(seed=0):
    return filled(nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)), seed)


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def train(model, optimizer, rank, steps, first=0, schedule=None):
    for k in range(first, first + steps):
        optimizer.zero_grad()
        model(batch(rank, k)).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def held(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a, b):
    """Assert that nested values are bitwise identical."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_all_same(results):
    for other in results[1:]:
        assert_same(results[0], other)


def alone(config=BARE, **settings):
    model = net()
    return model, SlowMo(sgd(model, **settings), model, config)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x))
