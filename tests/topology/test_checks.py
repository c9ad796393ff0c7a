"""Topologies by name and as arrays, and those that are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hvd_slowmo.topology.checks import topology
from hvd_slowmo.topology.graphs import NAMED, Array
from support.graphs import SIZES


def test_defaults() -> None:
    for m in SIZES:
        assert np.array_equal(topology(None, m), topology("exponential", m))
        even = "ring" if m % 2 else "bipartite"
        assert np.array_equal(topology(None, m, symmetric=True), topology(even, m))


def lazy(m: int) -> list[list[float]]:
    return [[0.9 * (i == j) + 0.1 * (i == (j + 1) % m) for j in range(m)] for i in range(m)]


def test_a_users_own() -> None:
    assert np.array_equal(topology(lazy, 5), np.array([lazy(5)]))
    assert np.array_equal(topology(lazy(5), 5), np.array([lazy(5)]))
    mine = np.array([lazy(5), np.eye(5)])
    p = topology(mine, 5)
    assert np.array_equal(p, mine)
    mine[:] = 0  # a copy
    assert p.any()
    assert np.array_equal(topology(np.eye(1, dtype=int), 1), [[[1.0]]])
    assert mine.flags.writeable


def with_entries(m: int, entries: dict[tuple[int, int, int], float]) -> Array:
    p = np.array(NAMED["exponential"](m))
    for place, value in entries.items():
        p[place] = value
    return p


ASYMMETRIC = {(0, 0, 0): 0.4, (0, 1, 0): 0.6}
REFUSED: list[tuple[Any, int, dict[str, Any], type[Exception], str]] = [
    ("hypercube", 4, {}, ValueError, r"one of 'exponential'.*Received: topology='hypercube'"),
    ("bipartite", 5, {}, ValueError, r"must be even\. Received: 5 workers\. 'ring'"),
    ("exponential", 5, {"symmetric": True}, ValueError, r"must be symmetric for D-PSGD.*P\[0, 1, 0\] = 0.5.*'ring'"),
    ("star", 3, {"symmetric": True}, ValueError, "must be symmetric"),
    ("ring", 0, {}, ValueError, "`workers` must be a positive integer. Received: workers=0"),
    ("ring", 2.5, {}, TypeError, "`workers` must be a positive integer"),
    ("ring", 10**400, {}, ValueError, "`workers` must be a positive integer, at most 9223372036854775807"),
    (np.eye(3), 4, {}, ValueError, r"shape \(period, 4, 4\).*Received: shape \(3, 3\)"),
    (np.zeros((0, 4, 4)), 4, {}, ValueError, r"Received: shape \(0, 4, 4\)"),
    (np.ones(4), 4, {}, ValueError, "shape"),
    ([[1.0, 0.0], [1.0]], 2, {}, ValueError, "rows that differ"),
    ([["a", "b"], ["c", "d"]], 2, {}, TypeError, "array of numbers"),
    (np.eye(2, dtype=complex), 2, {}, TypeError, "array of numbers"),
    (lambda m: None, 2, {}, TypeError, r"function <lambda> must be an array of numbers.*None"),
    (lambda m: lazy(3), 2, {}, ValueError, r"for 2 workers.*shape \(3, 3\)"),
    (with_entries(4, {(1, 2, 3): math.nan}), 4, {}, ValueError, r"finite numbers. Received: P\[1, 2, 3\] = nan"),
    (with_entries(4, {(0, 0, 0): 1.5, (0, 1, 0): -0.5}), 4, {}, ValueError, r"negative.*P\[0, 1, 0\] = -0.5"),
    (with_entries(4, {(1, 0, 2): 0.6}), 4, {}, ValueError, r"P\[1, :, 2\] sums to 1.1\. Transpose"),
    (np.transpose(NAMED["star"](3), (0, 2, 1)), 3, {}, ValueError, "columns that sum to 1"),
    (np.full((3, 3), 1 / 3, dtype=np.float32), 3, {}, ValueError, "in float64"),
    (with_entries(4, {(1, 2, 2): 0, (1, 0, 2): 1}), 4, {}, ValueError, r"P\[1, 2, 2\] = 0"),
    (with_entries(4, ASYMMETRIC), 4, {"symmetric": True}, ValueError, r"P\[0, 0, 1\] = 0 and P\[0, 1, 0\] = 0.6"),
    (np.eye(3), 3, {}, ValueError, "worker 0 never hears of worker 1"),
    (NAMED["exponential"](4)[1:], 4, {}, ValueError, "worker 0 never hears of worker 1.*in one of the 1 step"),
    ([[0.5, 0], [0.5, 1]], 2, {}, ValueError, "worker 0 never hears of worker 1"),
    ("ring", 4, {"nodes": [[0, 1, 2], [3]]}, ValueError, "nodes of 3, 1 workers"),
    ("ring", 4, {"nodes": []}, ValueError, "nodes of one size"),
    ("ring", 4, {"nodes": [[0, 1], [2, 2]]}, ValueError, "each of the ranks 0 to 3 once"),
    ("ring", 4, {"nodes": [[0], [1]]}, ValueError, "each of the ranks 0 to 3 once"),
    ("bipartite", 6, {"nodes": [[0, 1], [2, 3], [4, 5]]}, ValueError, "Received: 3 workers"),
]


@pytest.mark.parametrize(("spec", "m", "options", "error", "message"), REFUSED)
def test_refused(spec: Any, m: int, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topology(spec, m, **options)


def test_float32_in_float64_is_the_cure() -> None:
    p = np.full((1, 3, 3), 1 / 3, dtype=np.float32).astype(np.float64)
    topology(p / p.sum(axis=-2, keepdims=True), 3)
