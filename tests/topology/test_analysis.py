"""Spectral gap and steps to consensus, against mixing told message by message."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hvd_slowmo.topology.analysis import spectral_gap, steps_to_consensus
from hvd_slowmo.topology.checks import topology
from hvd_slowmo.topology.graphs import Array
from support.graphs import CASES, mixed

POWERS = (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("m", POWERS)
@pytest.mark.parametrize("name", ["exponential", "bipartite"])
def test_powers_of_two_meet_the_mean(name: str, m: int) -> None:
    """After log2 m steps and not before, whichever step of the period is the first; exact in binary fractions."""
    p, x = topology(name, m), np.random.default_rng(0).integers(0, 1000, m).astype(float)
    log = int(math.log2(m))
    assert len(p) == max(log, 1)
    assert np.array_equal(mixed(p, x, log), np.full(m, x.mean()))
    assert steps_to_consensus(p, 1e-12) == log
    assert spectral_gap(p) == pytest.approx(1, abs=1e-12)
    for first in range(len(p)):
        turned = np.roll(p, -first, axis=0)
        if name == "exponential":
            assert np.array_equal(mixed(turned, x, log), np.full(m, x.mean()))


@pytest.mark.parametrize(("name", "m"), CASES)
def test_geometric_decay(name: str, m: int) -> None:
    """The distance from the mean shrinks over a period by 1 - the spectral gap, in the end."""
    p = topology(name, m)
    gap = spectral_gap(p)
    assert 0 < gap <= 1
    n = min(40, 1 + int(math.log(1e-9) / math.log(max(1 - gap, 1e-9))))
    x = np.random.default_rng(m).normal(size=m)
    away = [np.abs(mixed(p, x, periods * len(p)) - x.mean()).max() for periods in (0, n)]
    if gap > 1 - 1e-9:
        assert away[1] < 1e-12
    else:
        assert away[1] ** (1 / n) == pytest.approx(1 - gap, rel=0.5, abs=0.1)
        assert away[1] <= 20 * (1 - gap) ** n


@pytest.mark.parametrize(("name", "m"), [case for case in CASES if case[1] > 1])
def test_spectral_gap_by_power_iteration(name: str, m: int) -> None:
    """|lambda_2| as the growth of the powers of the product, without its projection on the stationary vector."""
    p = topology(name, m)
    product = np.eye(m)
    for matrix in p:
        product = matrix @ product
    stationary = np.linalg.matrix_power(product, 3000)[:, 0]
    rest = product - np.outer(stationary, np.ones(m))
    growth = np.linalg.norm(np.linalg.matrix_power(rest, 64), 2) ** (1 / 64)
    assert 1 - spectral_gap(p) == pytest.approx(growth, rel=0.05, abs=1e-8)


def test_spectral_gap_in_closed_form() -> None:
    for m in range(3, 17):
        assert spectral_gap(topology("ring", m)) == pytest.approx(1 - (1 + 2 * math.cos(2 * math.pi / m)) / 3)
        # Over gather and scatter, two others that differ keep half their difference.
        assert spectral_gap(topology("star", m)) == pytest.approx(0.5)
    assert spectral_gap(topology("exponential", 3)) == pytest.approx(0.75)  # |1 + w|^2 / 4 for w^3 = 1, squared


def worst(p: Array, steps: int) -> float:
    """Over starts of 0 and 1, all of them."""
    m = p.shape[1]
    starts = [np.array([bits >> i & 1 for i in range(m)], dtype=float) for bits in range(2**m)]
    return max(float(np.abs(mixed(p, x, steps) - x.mean()).max()) for x in starts)


@pytest.mark.parametrize(("name", "m"), [(name, m) for name, m in CASES if m <= 5])
@pytest.mark.parametrize("tolerance", [0.3, 0.02])
def test_steps_to_consensus_by_trying_all_starts(name: str, m: int, tolerance: float) -> None:
    p = topology(name, m)
    steps = steps_to_consensus(p, tolerance)
    assert worst(p, steps) <= tolerance
    assert steps == 0 or worst(p, steps - 1) > tolerance


def test_steps_to_consensus_of_a_long_ring() -> None:
    """Found without walking there."""
    assert 100_000 < steps_to_consensus(topology("ring", 500)) < 200_000
    assert [steps_to_consensus(topology("exponential", m)) for m in (12, 64)] == [19, 6]


@pytest.mark.parametrize("tolerance", [0, 1, -1e-3, math.nan])
def test_tolerance_that_cannot_be(tolerance: float) -> None:
    with pytest.raises(ValueError, match="`tolerance` must be a number"):
        steps_to_consensus(topology("ring", 5), tolerance)


def test_steps_to_consensus_that_never_comes() -> None:
    with pytest.raises(ValueError, match="connected"):
        steps_to_consensus(np.eye(3)[np.newaxis])
