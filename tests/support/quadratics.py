"""Noisy quadratics, rates and a comparison for the tests of the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Gradient = Callable[[int, int, Array], Array]
Rate = Callable[[int, int, int], float]
D = 5


def problem(workers: int, steps: int = 200, seed: int = 0, d: int = D) -> tuple[Array, Gradient]:
    """Return x0 (d,) and a quadratic's noisy gradient, which differs between workers and is deterministic."""
    rng = np.random.default_rng(seed)
    curvature, centre = rng.uniform(0.2, 2, (workers, d)), rng.normal(size=(workers, d))
    noise = 0.5 * rng.normal(size=(steps, workers, d))
    return rng.normal(size=d), lambda i, step, x: curvature[i] * (x - centre[i]) + noise[step, i]


def wavy(worker: int, step: int, group: int) -> float:
    """Return a rate that differs between workers, steps and groups."""
    return 0.05 * (1 + 0.3 * worker) * (1.5 + math.sin(step + group)) * (1 + group)


def common(worker: int, step: int, group: int) -> float:
    """Return a rate that differs between steps and groups only."""
    return wavy(0, step, group)


def close(a: Any, b: Any, tolerance: float = 1e-13) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
