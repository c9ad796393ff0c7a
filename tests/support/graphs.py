"""Every named topology by size, mixing message by message, and custom graphs."""

from __future__ import annotations

import numpy as np

from hvd_slowmo.topology.graphs import NAMED, Array

SIZES = range(1, 17)
CASES = [(name, m) for name in NAMED for m in SIZES if not (name == "bipartite" and m % 2 and m > 1)]


def mixed(array: Array, x: Array, steps: int) -> Array:
    """Return the de-biased values after some steps, message by message. x: (m,)."""
    period, m, _ = array.shape
    x, w = x.copy(), np.ones(m)
    for step in range(steps):
        new_x, new_w = np.zeros(m), np.zeros(m)
        for i in range(m):
            for j in range(m):
                new_x[i] += array[step % period, i, j] * x[j]
                new_w[i] += array[step % period, i, j] * w[j]
        x, w = new_x, new_w
    z: Array = x / w
    return z


def any_graph(m, period, seed, symmetric=False):
    """Return a column-stochastic, connected graph with positive diagonals and no more structure, so that w changes."""
    rng = np.random.default_rng(seed)
    if symmetric:  # a lazy mean with one partner at a time, and then with all
        p = np.eye(m) * 0.6 + np.eye(m)[rng.permutation(m)] * 0.4
        return np.stack([(p + p.T) / 2, np.full((m, m), 1 / m)])[:period] if period > 1 else np.full((1, m, m), 1 / m)
    p = rng.uniform(size=(period, m, m)) * rng.integers(0, 2, (period, m, m)) + np.eye(m) * rng.uniform(0.2, 1)
    p[0] += 0.5 * np.roll(np.eye(m), 1, axis=0)  # a ring, so that the graph is connected
    return p / p.sum(axis=1, keepdims=True)
