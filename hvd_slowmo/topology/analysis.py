"""Properties of a topology: who sends how much, and how fast the workers come together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.topology.graphs import Array

# Relative to weights of size 1, in float64; see checks.py.
_TOLERANCE = 1e-12


def out_degree(array: Array) -> NDArray[np.int64]:
    """(period, m): how many messages each worker sends at each step. One is a vector as long as the model."""
    sent: NDArray[np.int64] = (_others(array) > 0).sum(axis=1)
    return sent


def moves_weights(array: Array) -> bool:
    """Whether push-sum weights leave 1 when mixing is synchronous: some row does not sum to 1."""
    return bool(np.any(np.abs(array.sum(axis=2) - 1) > _TOLERANCE))


def spectral_gap(array: Array) -> float:
    """1 - |lambda_2| of the period's product P[-1] ... P[0]: by so much disagreement shrinks over a period, in the end.

    lambda_1 is 1, as columns sum to 1. 1 means that all agree after one period. Eigenvalues, not singular values: the
    product need not be symmetric, and its stationary vector (the push-sum weights) need not be even; de-biased values
    z = x / w approach the mean at the rate |lambda_2| all the same.
    """
    if array.shape[1] == 1:
        return 1.0
    moduli = np.sort(np.abs(np.linalg.eigvals(_product(array))))
    return float(1 - moduli[-2])


def steps_to_consensus(array: Array, tolerance: float = 1e-3) -> int:
    """How many mixings bring all de-biased values z = x / w within `tolerance` of the mean, from the worst start.

    The start's values span 1, so a start within [0, 1] ends within `tolerance` of its mean on every worker. Mixing
    begins at step 0 of the period, and the result is exact, no bound: 0 for one worker.

    Args:
        array: (period, m, m), connected (see `topology`).
        tolerance: in (0, 1). 1e-9 tells whether the mean is met exactly.

    Raises:
        ValueError: tolerance is out of its range, or rounding or a graph that is not connected keeps the values away.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must be a number in (0, 1). Received: tolerance={tolerance!r}")
    reached: Array = np.eye(array.shape[1])
    if _worst(reached) <= tolerance:
        return 0
    # The worst distance never grows: each z is a mean of the z before. So the last period that does not end within the
    # tolerance can be found by bisection, with the period's product squared again and again.
    squares = [_product(array)]
    while _worst(squares[-1]) > tolerance:
        if len(squares) > 50:
            raise ValueError(f"the workers do not come within {tolerance} of their mean: is the topology connected?")
        squares.append(squares[-1] @ squares[-1])
    steps = 0
    for power in range(len(squares) - 1, -1, -1):
        further = squares[power] @ reached
        if _worst(further) > tolerance:
            reached = further
            steps += 2**power * len(array)
    for matrix in array:
        reached = matrix @ reached
        steps += 1
        if _worst(reached) <= tolerance:
            break
    return steps


def _worst(mixed: Array) -> float:
    """The largest |z_i - mean| after the mixings whose product is `mixed` (m, m), over starts within [0, 1].

    z_i is a weighted mean of the start's values, weights mixed[i] / sum(mixed[i]); against equal weights the worst
    start is 1 where they are larger and 0 elsewhere.
    """
    weights = mixed / mixed.sum(axis=1, keepdims=True)
    return float(np.abs(weights - 1 / len(mixed)).sum(axis=1).max() / 2)


def _product(array: Array) -> Array:
    result: Array = np.eye(array.shape[1])
    for matrix in array:
        result = matrix @ result
    return result


def _others(array: Array) -> Array:
    """The array without what the workers keep."""
    others: Array = array * (1 - np.eye(array.shape[1]))
    return others
