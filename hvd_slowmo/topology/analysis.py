"""Properties of a topology: traffic, and speed at which the workers come together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.checked_numbers import real
from hvd_slowmo.topology.graphs import Array

# Relative to weights of size 1, in float64; see checks.py.
_TOLERANCE = 1e-12


def out_degree(array: Array) -> NDArray[np.int64]:
    """Return the number of messages that each worker sends at each step: (period, m).

    A message is a vector as long as the model.

    Example:
        >>> from hvd_slowmo.topology.graphs import ring
        >>> out_degree(ring(4)).tolist()
        [[2, 2, 2, 2]]
    """
    sent: NDArray[np.int64] = (_others(array) > 0).sum(axis=1)
    return sent


def moves_weights(array: Array) -> bool:
    """Return whether push-sum weights leave 1 when mixing is synchronous: some row does not sum to 1.

    Example:
        >>> from hvd_slowmo.topology.graphs import ring, star
        >>> moves_weights(ring(4)), moves_weights(star(4))
        (False, True)
    """
    return bool(np.any(np.abs(array.sum(axis=2) - 1) > _TOLERANCE))


def spectral_gap(array: Array) -> float:
    """Return 1 - |lambda_2| of the period's product P[-1] ... P[0].

    Disagreement shrinks by that share over a period, in the end; 1 means that all agree after one period. (lambda_1 is
    1, as columns sum to 1.) Eigenvalues, not singular values: the product need not be symmetric, and its stationary
    vector (the push-sum weights) need not be even; de-biased values z = x / w approach the mean at the rate |lambda_2|
    all the same.

    Example:
        >>> from hvd_slowmo.topology.graphs import full
        >>> round(spectral_gap(full(4)), 6)
        1.0
    """
    if array.shape[1] == 1:
        return 1.0
    moduli = np.sort(np.abs(np.linalg.eigvals(_product(array))))
    return float(1 - moduli[-2])


def steps_to_consensus(array: Array, tolerance: float = 1e-3) -> int:
    """Return the number of mixings that bring all de-biased values z = x / w within `tolerance` of the mean.

    From the worst start whose values span 1: any start within [0, 1] ends within `tolerance` of its mean on every
    worker. Mixing begins at step 0 of the period. The number is exact, not a bound, and 0 for one worker.

    Args:
        array: (period, m, m), connected (see `topology`).
        tolerance: in (0, 1). 1e-9 tells whether the mean is met exactly.

    Raises:
        ValueError: tolerance is out of its range, or rounding or a graph that is not connected keeps the values away.

    Example:
        >>> from hvd_slowmo.topology.graphs import exponential
        >>> steps_to_consensus(exponential(8))
        3
    """
    tolerance = real("tolerance", tolerance, lambda t: 0 < t < 1, "a number in (0, 1)")
    reached: Array = np.eye(array.shape[1])
    if _worst(reached) <= tolerance:
        return 0
    # The worst distance never grows: each z is a mean of the z before. So bisection finds the last period that does not
    # end within the tolerance, with the period's product squared again and again.
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
    """Return the largest |z_i - mean| after the mixings whose product is `mixed` (m, m), over starts within [0, 1].

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
    """Return the array without the shares that the workers keep."""
    others: Array = array * (1 - np.eye(array.shape[1]))
    return others
