"""Every named topology against what it promises, and the graphs over nodes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hvd_slowmo.topology.analysis import moves_weights, out_degree
from hvd_slowmo.topology.checks import consecutive_nodes, topology
from hvd_slowmo.topology.graphs import NAMED
from support.graphs import CASES, SIZES, mixed


def valid(name: str, m: int) -> bool:
    return name != "bipartite" or m % 2 == 0 or m == 1


@pytest.mark.parametrize(("name", "m"), CASES)
def test_named(name: str, m: int) -> None:
    p = topology(name, m)
    assert p.shape[1:] == (m, m)
    assert p.dtype == np.float64
    assert p.flags.c_contiguous
    assert not p.flags.writeable
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-15)
    assert (p >= 0).all()
    assert (np.diagonal(p, axis1=1, axis2=2) > 0).all()
    assert moves_weights(p) == (name == "star" and m > 1)
    if name in ("bipartite", "ring", "full"):
        assert np.array_equal(p, p.transpose(0, 2, 1))
        assert np.array_equal(topology(name, m, symmetric=True), p)
    if m == 1:
        assert np.array_equal(p, [[[1.0]]])


@pytest.mark.parametrize(("name", "m"), CASES)
def test_everyone_hears_of_everyone(name: str, m: int) -> None:
    """By passing on who was heard of, worker by worker."""
    p = topology(name, m)
    heard = [{i} for i in range(m)]
    for step in range(m * len(p)):
        heard = [set().union(*(heard[j] for j in range(m) if p[step % len(p), i, j] > 0)) for i in range(m)]
    assert heard == [set(range(m))] * m


@pytest.mark.parametrize("m", SIZES)
def test_who_sends_to_whom(m: int) -> None:
    """(step, from, to) of all messages, from the descriptions."""

    def messages(name: str) -> set[tuple[int, int, int]]:
        p = topology(name, m)
        return {(int(k), int(j), int(i)) for k, i, j in np.argwhere(p > 0) if i != j}

    hops = [2**k for k in range(math.floor(math.log2(m - 1)) + 1)] if m > 1 else []
    every = [(j, (j + h) % m) for j in range(m) for h in hops]
    assert messages("exponential") == {(hops.index((i - j) % m), j, i) for j, i in every}
    assert messages("complete") == {(0, j, i) for j, i in every}
    assert messages("full") == {(0, j, i) for j in range(m) for i in range(m) if i != j}
    assert messages("ring") == {(0, j, (j + h) % m) for j in range(m) for h in (1, -1) if (j + h) % m != j}
    assert messages("star") == {(0, j, 0) for j in range(1, m)} | {(1, 0, i) for i in range(1, m)}
    if m % 2 == 0:
        swaps = messages("bipartite")
        assert swaps == {(k, i, j) for k, j, i in swaps}
        assert all((i + j) % 2 for _, j, i in swaps)  # odd with even
        for k in range(len(topology("bipartite", m))):
            assert sorted(j for step, j, _ in swaps if step == k) == list(range(m))
            assert (k, 1, (1 + 2 ** (k + 1) - 1) % m) in swaps


@pytest.mark.parametrize(("name", "m"), CASES)
def test_messages_per_worker_and_step(name: str, m: int) -> None:
    degrees = out_degree(topology(name, m))
    hops = math.floor(math.log2(m - 1)) + 1 if m > 1 else 0
    usual = {"exponential": 1, "bipartite": 1, "complete": hops, "ring": min(2, m - 1), "full": m - 1}
    if name == "star" and m > 1:
        assert degrees.tolist() == [[0, *[1] * (m - 1)], [m - 1, *[0] * (m - 1)]]
    else:
        assert (degrees == min(usual.get(name, 0), m - 1)).all()


# Nodes


@pytest.mark.parametrize("name", list(NAMED))
@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 4), (2, 2), (4, 3), (3, 1), (6, 2)])
def test_nodes(name: str, n: int, size: int) -> None:
    if not valid(name, n):
        return
    nodes = consecutive_nodes(n * size, size)
    over_nodes, p = topology(name, n), topology(name, n * size, nodes=nodes)
    assert np.array_equal(p, np.kron(over_nodes, np.eye(size)))
    assert not p.flags.writeable
    # The workers of a node stay equal, to the bit, and are what the nodes alone would be.
    x = np.random.default_rng(0).normal(size=n)
    z, alone = mixed(p, np.repeat(x, size), 7), mixed(over_nodes, x, 7)
    assert np.array_equal(z, np.repeat(alone, size))
    assert np.array_equal(out_degree(p), np.repeat(out_degree(over_nodes), size, axis=1))


def test_nodes_whose_ranks_are_not_consecutive() -> None:
    p = topology("exponential", 4, nodes=[[0, 2], [3, 1]])
    assert np.argwhere(p[0] - np.eye(4) / 2 > 0).tolist() == [[0, 3], [1, 2], [2, 1], [3, 0]]


def test_nodes_must_divide_the_workers() -> None:
    assert consecutive_nodes(6, 3) == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="7 workers are not a whole number of nodes of 2"):
        consecutive_nodes(7, 2)
