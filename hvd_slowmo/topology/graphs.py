"""The named topologies: functions of the number of workers m that return the shares sent at each step.

Each returns a float64 array P of shape (period, m, m): at step k (mod period) x_i <- sum_j P[k, i, j] x_j, so that
P[k, i, j] is the share of worker j's mass that worker i receives. A column divides one worker's mass, so columns sum to
1. A row that does not sum to 1 belongs to a worker whose push-sum weight moves.

With one worker all of them are the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def exponential(m: int) -> Array:
    """Return the directed exponential graph, the default of SGP (Assran et al. 2019).

    One peer per step, 1, 2, 4, ... places on. Half is kept, half is sent: one message out and one in per worker and
    step. Where m is a power of two, all hold the mean after log2 m steps.

    Example:
        >>> exponential(4)[0, 1].tolist()
        [0.5, 0.5, 0.0, 0.0]
    """
    return np.stack([_shares(m, [hop]) for hop in _powers_below(m)] or [np.eye(m)])


def bipartite(m: int) -> Array:
    """Return the alternating bipartite exponential graph, the default of D-PSGD here.

    Each odd worker swaps with an even one, half kept. The partner of an odd worker is 1, 3, 7, 15, ... places on. The
    first swap makes pairs, and with these hops the distances between the pairs that meet next are 1, 2, 4, ...: as on
    `exponential`, all hold the mean after log2 m steps where m is a power of two. m must be even, or 1.

    Raises:
        ValueError: m is odd, so that one worker would be left over.

    Example:
        >>> bipartite(4)[0, 0].tolist()
        [0.5, 0.0, 0.0, 0.5]
    """
    if m == 1:
        return np.eye(1)[np.newaxis]
    if m % 2:
        raise ValueError(
            f"The topology 'bipartite' pairs the workers, so their number must be even. Received: {m} workers. "
            "'ring' is symmetric too and takes any number."
        )
    array = np.stack([np.eye(m) / 2] * (1 + len(_powers_below(m // 2))))
    for k, matrix in enumerate(array):
        for odd in range(1, m, 2):
            even = (odd + 2 ** (k + 1) - 1) % m
            matrix[even, odd] = matrix[odd, even] = 1 / 2
    return array


def complete(m: int) -> Array:
    """Return the complete exponential graph: to all workers 1, 2, 4, ... places on, equal shares, one kept.

    Example:
        >>> (complete(5)[0, :, 0] > 0).tolist()
        [True, True, True, False, True]
    """
    return _shares(m, _powers_below(m))[np.newaxis]


def ring(m: int) -> Array:
    """Return the ring: to both neighbours at every step, equal shares, one kept. Symmetric, for any m.

    Example:
        >>> (ring(5)[0, :, 0] > 0).tolist()
        [True, True, False, False, True]
    """
    return _shares(m, {1 % m, -1 % m} - {0})[np.newaxis]  # two workers: the neighbours are one and the same


def full(m: int) -> Array:
    """Return the full graph: to all, equal shares. The mean at every step, for m - 1 messages per worker.

    Example:
        >>> full(2).tolist()
        [[[0.5, 0.5], [0.5, 0.5]]]
    """
    return np.full((1, m, m), 1 / m)


def star(m: int) -> Array:
    """Return the star: all to the hub, then the hub to all, in alternation; worker 0 is the hub.

    At even steps the others keep half and send half to the hub; at odd steps the hub sends equal shares to all others
    and keeps one. Push-sum weights move on this graph: after the first step the hub's is (m + 1) / 2 and the others'
    1/2. Both directions at once would leave them at 1 for m = 2, where such a star is a ring; in alternation they move
    for every m > 1, and the weights differ from step to step.

    Example:
        >>> star(2).tolist()
        [[[1.0, 0.5], [0.0, 0.5]], [[0.5, 0.0], [0.5, 1.0]]]
    """
    if m == 1:
        return np.eye(1)[np.newaxis]
    gather, scatter = np.eye(m), np.eye(m)
    gather[1:] /= 2
    gather[0, 1:] = 1 / 2
    scatter[:, 0] = 1 / m
    return np.stack([gather, scatter])


NAMED: dict[str, Callable[[int], Array]] = {f.__name__: f for f in (exponential, bipartite, complete, ring, full, star)}


def spread(array: Array, nodes: Iterable[Iterable[int]]) -> Array:
    """Return a topology over nodes as one over their workers, for nodes whose workers hold equal values.

    Each worker sends to its counterpart, the worker of the same place in the other node: with consecutive ranks this is
    np.kron(P, identity). As the workers of a node hold equal values (they start equal, average their gradients, and
    then mix equal messages with equal weights, so they stay bitwise identical), one message per worker carries all
    information. np.kron(P, ones / size), each worker to all of the other node, would give the same values for `size`
    times the traffic.

    Args:
        array: (period, n, n), over n nodes.
        nodes: the ranks of each node's workers, n lists of one length that name each rank once.

    Returns:
        (period, m, m), over the m workers. On its own it is not connected: counterparts never hear of the others.

    Example:
        >>> spread(full(2), [[0, 1], [2, 3]])[0, 0].tolist()
        [0.5, 0.0, 0.5, 0.0]
    """
    places = np.array([list(ranks) for ranks in nodes])  # (n, size)
    result = np.zeros((len(array), places.size, places.size))
    for ranks in places.T:
        result[:, ranks[:, np.newaxis], ranks] = array
    return result


def _shares(m: int, hops: Collection[int]) -> Array:
    """Return (m, m): each worker keeps one of equal shares and sends one to each worker a hop further on."""
    sent = [np.roll(np.eye(m), hop, axis=0) for hop in hops]
    shares: Array = sum(sent, np.eye(m)) / (1 + len(sent))
    return shares


def _powers_below(m: int) -> list[int]:
    """Return 1, 2, 4, ... up to m - 1: 2^k for k = 0 .. floor(log2(m - 1)); none for one worker."""
    return [2**k for k in range((m - 1).bit_length())]
