"""The theorem: the mean squared gradient norm against the number of steps, and against the number of workers.

f(x) = sum over j of x_j^2 / (1 + x_j^2) in 20 dimensions, from x_j = 0.8, with normal noise on each worker's gradient,
tau = 8, and the theorem's rate alpha gamma / (1 - beta) = sqrt(m / K), K steps. It promises O(1 / sqrt(m K)): slopes of
-1/2 in both, on doubly logarithmic axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import hvd_slowmo.torch as slowmo

DIMENSIONS, BEGIN, TAU = 20, 0.8, 8


class Point(nn.Module):
    """The parameters; the input is the noise of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((DIMENSIONS,), BEGIN, dtype=torch.float64))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return (self.x**2 / (1 + self.x**2)).sum() + (noise * self.x).sum()


def squared_norm(x: torch.Tensor) -> float:
    """Return the squared norm of f's gradient."""
    return float(((2 * x / (1 + x**2) ** 2) ** 2).sum())


def run(beta: float, workers: int, steps: int, seed: int) -> float:
    """Return the mean over the steps of the squared gradient norm at the workers' mean."""
    config = slowmo.SlowMoConfig(tau=TAU, beta=beta)
    rate = (1 - beta) * math.sqrt(workers / steps)
    simulation = slowmo.Simulation(
        Point,
        inner=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        loss=lambda value, _: value,
        workers=workers,
        config=config,
    )
    generator = torch.Generator().manual_seed(seed)
    (stack,) = simulation.inner_optimizer.param_groups[0]["params"]
    total = 0.0
    for _ in range(steps):
        with torch.no_grad():
            total += squared_norm(stack.mean(dim=0))
        noise = torch.randn(workers, 1, DIMENSIONS, dtype=torch.float64, generator=generator)
        simulation.step(noise, torch.zeros(workers))
    return total / steps


class Slope(NamedTuple):
    """The slope of a straight line through doubly logarithmic points, with its standard error."""

    value: float
    error: float


def slope(xs: Sequence[float], ys: Sequence[float]) -> Slope:
    """Fit the line by least squares.

    Example:
        >>> found = slope([1, 4, 16], [2, 1, 0.5])
        >>> round(found.value, 6), round(found.error, 6)
        (-0.5, 0.0)
    """
    x, y = np.log(xs), np.log(ys)
    centred = x - x.mean()
    value = float((centred * y).sum() / (centred**2).sum())
    rest = y - y.mean() - value * centred
    error = math.sqrt(float((rest**2).sum()) / max(1, len(x) - 2) / float((centred**2).sum()))
    return Slope(value, error)
