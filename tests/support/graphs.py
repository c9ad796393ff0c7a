"""Graphs to gossip on that no topology has by name."""

import numpy as np


def any_graph(m, period, seed, symmetric=False):
    """Column-stochastic, connected, something kept, and nothing else: w moves."""
    rng = np.random.default_rng(seed)
    if symmetric:  # a lazy mean with one partner at a time, and then with all
        p = np.eye(m) * 0.6 + np.eye(m)[rng.permutation(m)] * 0.4
        return np.stack([(p + p.T) / 2, np.full((m, m), 1 / m)])[:period] if period > 1 else np.full((1, m, m), 1 / m)
    p = rng.uniform(size=(period, m, m)) * rng.integers(0, 2, (period, m, m)) + np.eye(m) * rng.uniform(0.2, 1)
    p[0] += 0.5 * np.roll(np.eye(m), 1, axis=0)  # a ring, so that everyone hears of everyone
    return p / p.sum(axis=1, keepdims=True)
