"""Topologies: the shares that workers send to each other at each step, checked when they are built.

A topology for m workers is a float64 array P of shape (period, m, m), see graphs.py: at step k counted from the end of
the warm-up, x_i <- sum_j P[k mod period, i, j] x_j. An array can be indexed by a traced step, and questions about the
graph are linear algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.checked_numbers import integer
from hvd_slowmo.topology.graphs import NAMED, Array, spread

Spec = str | Callable[[int], Any] | Sequence[Any] | NDArray[Any] | None

# Relative to weights of size 1, in float64. Wide enough for sums in any order, and narrow enough that the mass that a
# wrong column adds or loses stays below rounding noise over millions of steps.
_TOLERANCE = 1e-12


def topology(
    spec: Spec, workers: int, *, symmetric: bool = False, nodes: Sequence[Sequence[int]] | None = None
) -> Array:
    """Return the checked array of a topology: (period, m, m), float64, contiguous, read-only.

    Args:
        spec: a name of `NAMED`; an array (period, m, m), or (m, m) that is the same at every step; a function of m that
            returns one; or None, the default: "exponential"; if it must be symmetric "bipartite", or "ring" for an odd
            number of workers.
        workers: m, the number of workers.
        symmetric: every step's matrix must be symmetric (D-PSGD). Push-sum needs no symmetry.
        nodes: the ranks of each node's workers, where gradients are averaged within nodes. The topology is then one
            over nodes (its m is their number), and each worker sends to its counterparts in the other nodes.

    Raises:
        TypeError, ValueError: the array is not of numbers or of another shape, is negative somewhere, has a column that
            does not sum to 1 (mass would be added or lost), lets a worker keep nothing at a step (push-sum divides by
            the kept weight), or is not connected: over a period every worker must hear of every other one, if only
            through others.

    Example:
        >>> topology("exponential", 8).shape
        (3, 8, 8)
    """
    m = integer("workers", workers, 1, "a positive integer")
    if nodes is not None:
        _check_nodes(nodes, m)
        m = len(nodes)
    array = _checked(_resolved(spec, m, symmetric), m, _title(spec), symmetric)
    if nodes is not None:
        array = np.ascontiguousarray(spread(array, nodes))
    array.setflags(write=False)
    return array


def consecutive_nodes(workers: int, node_size: int) -> list[list[int]]:
    """Return the ranks of each node's workers where the launcher fills one node after the other.

    Example:
        >>> consecutive_nodes(4, 2)
        [[0, 1], [2, 3]]
    """
    m = integer("workers", workers, 1, "a positive integer")
    size = integer("node_size", node_size, 1, "a positive integer")
    if m % size:
        raise ValueError(f"{m} workers are not a whole number of nodes of {size}. Received: node_size={size}")
    return [list(range(first, first + size)) for first in range(0, m, size)]


def _check_nodes(nodes: Sequence[Sequence[int]], m: int) -> None:
    sizes = [len(ranks) for ranks in nodes]
    if len(set(sizes)) != 1:
        raise ValueError(
            "A topology over nodes needs nodes of one size: each worker sends to its counterpart in another node. "
            f"Received: nodes of {', '.join(map(str, sizes)) or 'no'} workers. Start equally many workers on each "
            "node, or use gradients='local'."
        )
    if sorted(rank for ranks in nodes for rank in ranks) != list(range(m)):
        raise ValueError(f"`nodes` must name each of the ranks 0 to {m - 1} once. Received: {nodes!r}")


def _title(spec: Spec) -> str:
    if spec is None or isinstance(spec, str):
        return f"The topology {spec!r}"
    return f"The topology of the function {getattr(spec, '__name__', spec)}" if callable(spec) else "The topology"


def _resolved(spec: Spec, m: int, symmetric: bool) -> Any:
    if spec is None:
        spec = "exponential" if not symmetric else "ring" if m % 2 else "bipartite"
    if isinstance(spec, str):
        if spec not in NAMED:
            raise ValueError(
                f"`topology` must be one of {', '.join(map(repr, NAMED))}, an array (period, m, m), or a function of "
                f"m. Received: topology={spec!r}"
            )
        return NAMED[spec](m)
    return spec(m) if callable(spec) else spec


def _checked(received: Any, m: int, title: str, symmetric: bool) -> Array:
    try:
        array = np.array(received)
    except ValueError:
        raise ValueError(
            f"{title} must have the shape (period, {m}, {m}). Received: rows that differ in length"
        ) from None
    if array.dtype.kind not in "iuf":
        raise TypeError(
            f"{title} must be an array of numbers of shape (period, {m}, {m}), a name or a function of m. "
            f"Received: {received!r}"
        )
    array = np.ascontiguousarray(array[np.newaxis] if array.ndim == 2 else array, dtype=np.float64)
    if array.ndim != 3 or array.shape[1:] != (m, m) or not len(array):
        raise ValueError(
            f"{title} must have the shape (period, {m}, {m}), or ({m}, {m}), for {m} workers (or nodes). "
            f"Received: shape {np.shape(received)}. A function of m fits any number of them."
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{title} must hold finite numbers. Received: {_first(array, ~np.isfinite(array))}")
    if (array < 0).any():
        raise ValueError(
            f"{title} must not be negative: a column divides a worker's mass. Received: {_first(array, array < 0)}"
        )
    sums = array.sum(axis=1)
    if (np.abs(sums - 1) > _TOLERANCE).any():
        k, j = np.argwhere(np.abs(sums - 1) > _TOLERANCE)[0]
        raise ValueError(
            f"{title} must have columns that sum to 1: column j divides the mass of worker j, and any other sum adds "
            f"or loses mass. Received: P[{k}, :, {j}] sums to {sums[k, j]:.15g}. Transpose it if its rows sum to 1, or "
            "divide by P.sum(axis=-2, keepdims=True), in float64."
        )
    own = np.diagonal(array, axis1=1, axis2=2)
    if (own <= 0).any():
        k, i = np.argwhere(own <= 0)[0]
        raise ValueError(
            f"{title} must let each worker keep a share at every step: push-sum divides by the kept weight. Received: "
            f"P[{k}, {i}, {i}] = 0. Half kept, half sent is usual."
        )
    if symmetric and (np.abs(array - array.transpose(0, 2, 1)) > _TOLERANCE).any():
        k, i, j = np.argwhere(np.abs(array - array.transpose(0, 2, 1)) > _TOLERANCE)[0]
        raise ValueError(
            f"{title} must be symmetric for D-PSGD, which has no push-sum weights to correct for asymmetry. "
            f"Received: P[{k}, {i}, {j}] = {array[k, i, j]:.6g} and P[{k}, {j}, {i}] = {array[k, j, i]:.6g}. "
            "'ring', 'full' and, for an even number, 'bipartite' are symmetric; gossip=SGP() takes any."
        )
    heard = _heard(array)
    if not heard.all():
        i, j = np.argwhere(~heard)[0]
        raise ValueError(
            f"{title} must be connected over a period, or the workers never agree. Received: worker {i} never hears of "
            f"worker {j}, not even through others. Add a path from {j} to {i} in one of the {len(array)} step(s)."
        )
    return array


def _heard(array: Array) -> NDArray[np.bool_]:
    """Return whether worker i ever hears of worker j: (m, m). The diagonal is positive, so nothing heard is lost."""
    union: NDArray[np.bool_] = np.any(array > 0, axis=0)
    for _ in range(array.shape[1].bit_length()):  # twice as many steps further, each time
        union = np.asarray((union.astype(np.float64) @ union) > 0)
    return union


def _first(array: Array, wrong: NDArray[np.bool_]) -> str:
    k, i, j = np.argwhere(wrong)[0]
    return f"P[{k}, {i}, {j}] = {array[k, i, j]}"
