"""Noisy quadratics, rates, graphs and a comparison for the tests of the gossip oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.gossip import GossipSnapshot

Array = NDArray[np.float64]
Gradient = Callable[[int, int, Array], Array]
Rate = Callable[[int, int, int], float]
D = 4
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"weight_decay": 0.1}),
    "momentum": ("sgd", {"momentum": 0.8}),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "adam": ("adam", {"betas": (0.7, 0.95), "eps": 1e-3}),
    "adamw": ("adamw", {"eps": 1e-3}),
}


def problem(workers: int, steps: int = 200, seed: int = 0) -> tuple[Array, Gradient]:
    """Return x0 (d,) and a quadratic's noisy gradient, which differs between workers and is deterministic."""
    rng = np.random.default_rng(seed)
    curvature, centre = rng.uniform(0.2, 2, (workers, D)), rng.normal(size=(workers, D))
    noise = 0.5 * rng.normal(size=(steps, workers, D))
    return rng.normal(size=D), lambda i, step, x: curvature[i] * (x - centre[i]) + noise[step, i]


def wavy(worker: int, step: int, group: int) -> float:
    """Return a rate that differs between workers, steps and groups."""
    return 0.05 * (1 + 0.3 * worker) * (1.5 + math.sin(step + group)) * (1 + group)


def common(worker: int, step: int, group: int) -> float:
    return wavy(0, step, group)


def close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def climb(*speeds: float) -> Gradient:
    """Return constant gradients: worker i climbs by speeds[i] x rate in every step (d = 1)."""
    return lambda worker, step, x: np.array([-speeds[worker]])


def any_graph(m: int, period: int, seed: int) -> Array:
    """Return a column-stochastic graph with positive diagonals and no more structure, so that w changes."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(size=(period, m, m)) * rng.integers(0, 2, (period, m, m)) + np.eye(m) * rng.uniform(0.2, 1)
    p /= p.sum(axis=1, keepdims=True)
    return p


def masses(s: GossipSnapshot) -> tuple[Array, float]:
    """Return the masses of numerators, (d,), and of weights, with messages in flight."""
    return s.x.sum(axis=0) + s.flying_x.sum(axis=0), float(s.w.sum() + s.flying_w.sum())
